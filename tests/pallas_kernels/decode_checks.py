"""What tests of the kernels that decode share: arrays, and the comparison with a definition."""

from typing import Any

import chex
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

INTERPRET = plgpu.InterpretGPUParams()


def normal(seed: int, *shape: int) -> jax.Array:
    """Random bfloat16 numbers."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def exact(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """The same numbers in float32."""
    return tuple(None if x is None else x.astype(jnp.float32) for x in arrays)


def check(actual: Any, desired: Any) -> None:
    """Compares output and log-sum-exp of a kernel with those of the definition in float32."""
    (output, lse), (desired_output, desired_lse) = actual, desired
    assert output.dtype == jnp.bfloat16
    chex.assert_trees_all_close(lse, desired_lse, atol=1e-4)
    error = jnp.linalg.norm((output - desired_output).ravel())
    assert error < 5e-3 * jnp.linalg.norm(desired_output.ravel())
