"""Mosaic GPU kernel of decode_attention: `mosaic.decode` over all keys."""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl

from pallas_kernels.mosaic import decode, decode_walk


# Compiled by itself, so that layers of the same sizes are lowered once.
@functools.partial(jax.jit, static_argnames=("scale", "splits", "interpret"))
def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    lengths: jax.Array,
    rope_key: jax.Array | None,
    scale: float,
    *,
    splits: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_attention`; `splits` and `interpret` are for tests.

    Raises:
      NotImplementedError: The kernel cannot take the call.
    """
    cache = decode_walk.Cache(key, value, rope_key)
    sizes = decode_walk.tiling(cache)
    batch, num_keys, num_kv_heads, _ = key.shape
    num_tiles = pl.cdiv(num_keys, decode_walk.KEYS)
    return decode.decode(
        query, cache, lengths, None, scale=scale, sizes=sizes, name="decode_attention",
        splits=splits or decode_walk.num_splits(batch * num_kv_heads, num_tiles, sizes.resident),
        interpret=interpret,
    )  # fmt: skip
