"""Mosaic GPU kernel of sliding_window_attention: keys are seen for `window_size`."""

from typing import Any

import jax

from pallas_kernels.mosaic.flash_attention import Settings, flash_attention
from pallas_kernels.mosaic.key_range import NO_WINDOW, KeyRange


def sliding_window_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    window_size: int,
    value_dim: int | None,
    segment_ids: jax.Array | None,
    scale: float,
    query_offset: jax.Array | int | None = None,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.sliding_window_attention`.

    `interpret` takes `plgpu.InterpretGPUParams()`, for tests without a GPU.
    """
    value_dim = value_dim or key.shape[-1] if value is None else value.shape[-1]
    settings = Settings(
        "sliding_window_attention",
        KeyRange(window=min(window_size, NO_WINDOW)),
        value_dim,
        scale,
        warpgroups=1 if interpret else 2,
        interpret=interpret,
    )
    return flash_attention(query, key, value, segment_ids, query_offset, settings)
