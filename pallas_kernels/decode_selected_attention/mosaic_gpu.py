"""Mosaic GPU kernel of decode_selected_attention: `mosaic.decode` over blocks gathered to tiles."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic import decode, decode_walk


# Compiled by itself, so that layers of the same sizes are lowered once.
@functools.partial(jax.jit, static_argnames=("block_size", "scale", "splits", "interpret"))
def decode_selected_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    block_indices: jax.Array,
    lengths: jax.Array,
    block_size: int,
    rope_key: jax.Array | None,
    scale: float,
    *,
    splits: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_selected_attention`; `splits` and `interpret` are for tests.

    Raises:
      NotImplementedError: The kernel cannot take the call.
    """
    cache = decode_walk.Cache(key, value, rope_key)
    sizes = decode_walk.tiling(cache, block_size)
    batch, num_kv_heads, length = block_indices.shape
    padding = ((0, 0), (0, 0), (0, -length % sizes.pieces))
    block_indices = jnp.pad(block_indices.astype(jnp.int32), padding, constant_values=-1)
    num_tiles = block_indices.shape[2] // sizes.pieces
    return decode.decode(
        query, cache, lengths, block_indices, scale=scale, sizes=sizes,
        splits=splits or decode_walk.num_splits(batch * num_kv_heads, num_tiles, sizes.resident),
        name="decode_selected_attention", interpret=interpret,
    )  # fmt: skip
