"""Compilation for the tests of the model."""

import pytest


@pytest.fixture(autouse=True)
def compile_fast(fast_compilation: None) -> None:
    """Every test asks for `fast_compilation`."""
