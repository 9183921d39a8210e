"""Definition of sliding_window_attention in XLA.

Queries are cut in bands of consecutive tokens; a band sees its own keys and those of the few bands before it that
the window reaches, so that scores are [T, band + window] and never [T, T].
"""

import jax
import jax.numpy as jnp

from pallas_kernels import blocks, chunking
from pallas_kernels.masked_attention import masked_attention, merge_heads, split_heads


def sliding_window_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window_size: int,
    segment_ids: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.sliding_window_attention`."""
    batch, length, num_heads, _ = query.shape
    band_size = min(window_size, length)
    num_previous = -(-(window_size - 1) // band_size)
    num_previous = min(num_previous, -(-length // band_size) - 1)

    def bands(array: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, T / band, band, ...]
        padded = chunking.pad_axis1(array, band_size)
        return padded.reshape(array.shape[0], -1, band_size, *array.shape[2:])

    def keys_of_bands(array: jax.Array) -> jax.Array:  # [B, T / band, (previous + 1) * band, ...]
        own = bands(array)
        num_bands = own.shape[1]
        padding = ((0, 0), (num_previous, 0), *((0, 0),) * (own.ndim - 2))
        padded = jnp.pad(own, padding)
        shifted = [padded[:, i : i + num_bands] for i in range(num_previous + 1)]
        return jnp.concatenate(shifted, axis=2)

    def attend(query, key, value, query_segments, key_segments, band):
        num_bands = query.shape[1]
        key_offset = jnp.arange(key.shape[2]) - num_previous * band_size
        distance = jnp.arange(band_size)[:, None] - key_offset
        visible = (distance >= 0) & (distance < window_size)
        visible = visible & (band[0, :, None, None] * band_size + key_offset >= 0)
        visible = visible[None]
        if query_segments is not None:
            visible &= blocks.same_document(query_segments[..., None], key_segments[..., None, :])
        visible = jnp.broadcast_to(visible, (query.shape[0], *visible.shape[1:]))
        fold = lambda array: array.reshape(-1, *array.shape[2:])
        output, lse = masked_attention(
            split_heads(fold(query), key.shape[3]),
            fold(key),
            fold(value),
            fold(visible)[:, None, :, None],
            scale,
        )
        unfold = lambda array: array.reshape(
            batch, num_bands, band_size, num_heads, *array.shape[4:]
        )
        return unfold(output), unfold(lse)

    arrays = (
        bands(query),
        keys_of_bands(key),
        keys_of_bands(value),
        None if segment_ids is None else bands(segment_ids),
        None if segment_ids is None else keys_of_bands(segment_ids),
        jnp.arange(-(-length // band_size))[None],
    )
    scores_per_band = batch * num_heads * band_size * band_size * (num_previous + 1)
    output, lse = chunking.map_chunks(attend, arrays, chunking.rows_per_chunk(scores_per_band))
    merge = lambda array: array.reshape(batch, -1, *array.shape[3:])[:, :length]
    return merge(output), merge(lse)
