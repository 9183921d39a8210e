"""What tests of kernels ask of the machine."""

import os

import pytest

from pallas_kernels import dispatch

# Workers of pytest-xdist share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests that are marked `gpu` where they cannot run."""
    if item.get_closest_marker("gpu") and not dispatch.is_hopper():
        pytest.skip("needs a Hopper GPU")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are chosen as on a Hopper GPU."""
    monkeypatch.setattr(dispatch, "is_hopper", lambda: True)


@pytest.fixture
def no_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not chosen, whatever runs the test."""
    monkeypatch.setattr(dispatch, "is_hopper", lambda: False)
