"""Which implementation runs: by name, by default, and where the kernel declines."""

import logging

import jax
import pytest

from pallas_kernels import dispatch


def kernel() -> str:
    return "kernel"


def reference() -> str:
    return "reference"


def declining() -> str:
    raise NotImplementedError("head dim 7")


def run(implementation, mosaic_gpu=kernel):
    return dispatch.run("op", implementation, mosaic_gpu=mosaic_gpu, xla=reference)


def test_default_is_the_kernel_on_hopper(hopper):
    assert run(None) == "kernel"
    assert run("xla") == "reference"


def test_default_is_xla_elsewhere(no_hopper):
    assert run(None) == "reference"


def test_kernel_by_name_needs_hopper(no_hopper):
    with pytest.raises(NotImplementedError, match="op: mosaic_gpu needs a Hopper GPU"):
        run("mosaic_gpu")


def test_kernel_by_name_may_not_decline(hopper):
    with pytest.raises(NotImplementedError, match="op: head dim 7"):
        run("mosaic_gpu", declining)


def test_default_falls_back_and_says_so_once(hopper, caplog):
    dispatch._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert run(None, declining) == "reference"
        assert run(None, declining) == "reference"
    assert caplog.messages == ["op runs in XLA instead of mosaic_gpu: head dim 7"]


@pytest.mark.parametrize("implementation", ["triton", "", 1])
def test_unknown_name(implementation):
    with pytest.raises(ValueError, match="expected 'mosaic_gpu', 'xla' or None"):
        run(implementation)


def test_one_line_says_what_runs(hopper):
    device = jax.devices()[0].device_kind
    assert dispatch.describe(None) == f"attention: mosaic_gpu kernels on {device}"
    assert dispatch.describe("xla") == f"attention: xla on {device}"


@pytest.mark.parametrize(("capability", "expected"), [("9.0", True), ("8.0", False)])
def test_hopper_is_compute_capability_9(monkeypatch, capability, expected):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert dispatch.is_hopper() is expected


def test_a_program_can_be_traced_for_a_hopper_gpu_that_is_not_here():
    with dispatch.assumed_hopper():
        assert run(None) == "kernel"
    assert run(None) == "reference"
