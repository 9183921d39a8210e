"""Definition of compressed_attention in XLA."""

import jax

from pallas_kernels import blocks, chunking
from pallas_kernels.masked_attention import masked_attention, merge_heads, split_heads


def compressed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_size: int,
    stride: int,
    segment_ids: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.compressed_attention`."""
    batch, length, num_heads, _ = query.shape

    def attend(query, segments, positions):
        visible = blocks.visible_blocks(
            positions, segments, segment_ids, key.shape[1], block_size, stride
        )
        query = split_heads(query, key.shape[2])
        output, lse = masked_attention(query, key, value, visible[:, None, :, None], scale)
        return merge_heads(output), lse.reshape(*lse.shape[:2], num_heads)

    arrays = (query, segment_ids, blocks.token_positions(length))
    chunk_size = chunking.rows_per_chunk(batch * num_heads * key.shape[1])
    return chunking.map_chunks(attend, arrays, chunk_size)
