"""What tests of several folders ask for."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def fast_compilation() -> Iterator[None]:
    """Compiles in half the time: a test runs what it compiles once, on a few hundred numbers."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
