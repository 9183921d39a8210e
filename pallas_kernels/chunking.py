"""Work on a long axis piece by piece, so that memory stays linear in its length."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Scores that exist at a time: 64 MiB in float32, a few times that with the gradient's temporaries.
SCORES_PER_CHUNK = 2**24


def rows_per_chunk(scores_per_row: int) -> int:
    """Number of rows whose scores fit in a chunk, at least one."""
    return max(1, SCORES_PER_CHUNK // max(1, scores_per_row))


def pad_axis1(array: jax.Array, multiple: int) -> jax.Array:
    """Pads axis 1 with zeros at its end up to a multiple."""
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, -array.shape[1] % multiple)
    return jnp.pad(array, padding)


def map_chunks(body: Callable[..., Any], arrays: tuple[Any, ...], chunk_size: int) -> Any:
    """Equals `body(*arrays)` for a body that treats axis 1 element by element.

    Runs chunk after chunk and recomputes each in the gradient, so that what the body makes of one chunk never
    exists for two. A whole that fits in one chunk is one plain call: XLA's CPU threads serve it better.

    Args:
      body: Takes the arrays, or equal slices of them along axis 1; returns arrays with the same axis 1.
      arrays: Arrays (or None) with axis 1 of one length.
      chunk_size: Length of a slice.

    Returns:
      What `body` returns.
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    if length <= chunk_size:
        return body(*arrays)

    def split(array: jax.Array) -> jax.Array:
        padded = pad_axis1(array, chunk_size)
        return jnp.moveaxis(padded.reshape(array.shape[0], -1, chunk_size, *array.shape[2:]), 1, 0)

    def merge(chunks: jax.Array) -> jax.Array:
        joined = jnp.moveaxis(chunks, 0, 1)
        return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]

    chunked_body = jax.checkpoint(lambda chunk: body(*chunk))
    return jax.tree.map(merge, jax.lax.map(chunked_body, jax.tree.map(split, arrays)))
