"""Random parameters as decoding holds them, for measurements."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def random_params(shapes: Any, stddev: float) -> Any:
    """Draws normal matrices; vectors, which scale, are ones.

    Args:
        shapes: of the parameters, with dtypes: `step_bytes.serving_shapes`.
        stddev: of the matrices.
    """
    leaves, structure = jax.tree.flatten(shapes)
    drawn = [
        random_array(seed, x.shape, x.dtype, stddev) if x.ndim > 1 else jnp.ones(x.shape, x.dtype)
        for seed, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_array(seed: int, shape: tuple[int, ...], dtype: Any, stddev: float) -> jax.Array:
    """Normal numbers; not by the default generator, which needs seconds for some gigabytes."""
    return stddev * jax.random.normal(jax.random.key(seed, impl="rbg"), shape, dtype)
