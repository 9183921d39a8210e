"""Definition of sliding_window_attention in XLA.

A row is cut in bands as long as the window, so that a query sees keys of its own band and of the
one before it only: the scores are [T, 2 * window].
"""

import jax
import jax.numpy as jnp

from pallas_kernels import blocks, chunking
from pallas_kernels.masked_attention import masked_attention, statistics_dtype


def sliding_window_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window_size: int,
    segment_ids: jax.Array | None,
    scale: float,
    query_offset: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.sliding_window_attention`; value is given."""
    if query_offset is None:
        return attend_row(query, key, value, window_size, segment_ids, scale)
    if segment_ids is None:
        segment_ids = jnp.ones(key.shape[:2], jnp.int32)
    num_queries = query.shape[1]
    halo = min(window_size - 1, key.shape[1] - num_queries)  # earlier tokens that queries may see

    def pad(array: jax.Array) -> jax.Array:
        return jnp.pad(array, ((0, 0), (halo, 0), *((0, 0) for _ in array.shape[2:])))

    def part(row: jax.Array) -> jax.Array:
        return blocks.of_queries(pad(row), halo + num_queries, query_offset)

    row = pad(query), part(key), part(value), window_size, part(segment_ids), scale
    return jax.tree.map(lambda array: array[:, halo:], attend_row(*row))


def attend_row(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window_size: int,
    segment_ids: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attends from every token of a row."""
    batch, length, num_heads, _ = query.shape
    band_size = min(window_size, length)
    num_bands = -(-length // band_size)
    num_keys = band_size if num_bands == 1 else 2 * band_size

    def bands(array: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, bands, band_size, ...]
        return chunking.split_axis1(array, band_size)

    def key_bands(array: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, bands, num_keys, ...]
        own = bands(array.astype(statistics_dtype(array.dtype)))  # the gradient adds up over bands
        if num_bands == 1:
            return own
        before = jnp.pad(own[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
        return jnp.concatenate([before, own], axis=2)

    def attend_bands(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        fold = (array.reshape(-1, *array.shape[2:]) for array in arrays)
        query, positions, earliest, key, value = fold
        band_ends = positions[:, -1:]
        key_positions = (band_ends - num_keys + 1 + jnp.arange(num_keys))[:, None]

        def attend(
            query: jax.Array, positions: jax.Array, earliest: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            visible = earliest[..., None] <= key_positions
            visible &= key_positions <= positions[..., None]
            return masked_attention(query, key, value, visible[:, None], scale)

        chunk_size = chunking.rows_per_chunk(query.shape[0] * num_heads * num_keys)
        results = chunking.map_chunks(attend, (query, positions, earliest), chunk_size)
        return jax.tree.map(lambda array: array.reshape(batch, -1, *array.shape[1:]), results)

    positions = blocks.token_positions(num_bands * band_size)
    first_visible = blocks.visible_from(segment_ids, length)
    first_visible = chunking.pad_to_multiple(first_visible, band_size)
    earliest = jnp.maximum(first_visible, positions - window_size + 1)
    positions, earliest = (
        bands(jnp.broadcast_to(array, (batch, num_bands * band_size)))
        for array in (positions, earliest)
    )
    arrays = (bands(query), positions, earliest, key_bands(key), key_bands(value))
    chunk_size = chunking.rows_per_chunk(batch * num_heads * band_size * num_keys)
    results = chunking.map_chunks(attend_bands, arrays, chunk_size)
    return jax.tree.map(lambda array: chunking.merge_axis1(array, length), results)
