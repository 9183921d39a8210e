"""Definition of compressed_attention in XLA."""

import jax

from pallas_kernels import blocks, chunking
from pallas_kernels.masked_attention import masked_attention, statistics_dtype


def compressed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_size: int,
    stride: int,
    segment_ids: jax.Array | None,
    scale: float,
    query_offset: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.compressed_attention`; value is given."""
    batch, num_queries, num_heads, _ = query.shape
    num_blocks = key.shape[1]
    sums = statistics_dtype(query.dtype)  # the gradient adds up over chunks
    key, value = key.astype(sums), value.astype(sums)

    def attend(
        query: jax.Array, positions: jax.Array, first_visible: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        visible = blocks.complete_blocks(positions, first_visible, num_blocks, block_size, stride)
        return masked_attention(query, key, value, visible[:, None], scale)

    arrays = (query, *blocks.query_rows(segment_ids, num_queries, query_offset))
    chunk_size = chunking.rows_per_chunk(batch * num_heads * num_blocks)
    return chunking.map_chunks(attend, arrays, chunk_size)
