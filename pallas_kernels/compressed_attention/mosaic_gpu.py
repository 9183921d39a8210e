"""Mosaic GPU kernel of compressed_attention: keys of one block each, seen once it is complete."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic.flash_attention import Settings, flash_attention
from pallas_kernels.mosaic.key_range import KeyRange


def compressed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    block_size: int,
    stride: int,
    value_dim: int | None,
    segment_ids: jax.Array | None,
    scale: float,
    query_offset: jax.Array | int | None = None,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.compressed_attention`.

    `interpret` takes `plgpu.InterpretGPUParams()`, for tests without a GPU.
    """
    value_dim = value_dim or key.shape[-1] if value is None else value.shape[-1]
    if key.shape[1] == 0:
        output = jnp.zeros((*query.shape[:3], value_dim), query.dtype)
        return output, jnp.full(query.shape[:3], -jnp.inf, jnp.float32)
    settings = Settings(
        "compressed_attention",
        KeyRange(block_size, stride),
        value_dim,
        scale,
        warpgroups=1 if interpret else 2,
        interpret=interpret,
    )
    return flash_attention(query, key, value, segment_ids, query_offset, settings)
