import jax
import pytest


@pytest.fixture
def fast_compilation():
    """Compiles small programs for a CPU in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
