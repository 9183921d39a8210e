"""Work on a long axis piece by piece, so that memory stays linear in its length."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.masked_attention import RESIDUAL_NAMES

# Scores that exist at a time. 4 MiB in float32 stay in a CPU's cache between the products that make
# and use them: a pass at B=8, T=512, N=4 on two cores takes 11 ms, and 37 ms with all at once.
SCORES_PER_CHUNK = 2**20


def rows_per_chunk(scores_per_row: int) -> int:
    """Returns how many rows of so many scores (over batch, heads and keys) make a chunk."""
    return max(1, SCORES_PER_CHUNK // max(1, scores_per_row))


def pad_to_multiple(array: jax.Array, multiple: int) -> jax.Array:
    """Pads axis 1 with zeros at its end."""
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, -array.shape[1] % multiple)
    return jnp.pad(array, padding)


def split_axis1(array: jax.Array, size: int) -> jax.Array:
    """Cuts axis 1 in pieces, the last padded: [B, T, ...] -> [B, ceil(T / size), size, ...]."""
    padded = pad_to_multiple(array, size)
    return padded.reshape(array.shape[0], padded.shape[1] // size, size, *array.shape[2:])


def merge_axis1(pieces: jax.Array, length: int) -> jax.Array:
    """Undoes `split_axis1` of an array whose axis 1 had this length."""
    batch, number, size, *rest = pieces.shape
    return pieces.reshape(batch, number * size, *rest)[:, :length]


def map_chunks(body: Callable[..., Any], arrays: tuple[jax.Array, ...], chunk_size: int) -> Any:
    """Equals `body(*arrays)` for a body that treats axis 1 element by element, but works in chunks.

    The gradient computes each chunk anew, save the residuals of `masked_attention`: what the body
    makes of a chunk never exists for two of them.

    Args:
      body: Takes the arrays, or slices of them along axis 1; returns arrays with the same axis 1.
      arrays: Arrays whose axis 1 has one length.
      chunk_size: Length of a slice.

    Returns:
      What `body` returns.
    """
    length = arrays[0].shape[1]
    if length <= chunk_size:
        return body(*arrays)
    policy = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    chunk_body = jax.checkpoint(lambda chunk: body(*chunk), policy=policy)
    chunks = tuple(jnp.moveaxis(split_axis1(array, chunk_size), 1, 0) for array in arrays)
    results = jax.lax.map(chunk_body, chunks)
    return jax.tree.map(lambda array: merge_axis1(jnp.moveaxis(array, 0, 1), length), results)
