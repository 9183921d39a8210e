"""Definition of select_blocks in XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels import blocks, chunking
from pallas_kernels.masked_attention import attention_scores, to_rows


def block_importance(
    probabilities: jax.Array,
    *,
    num_blocks: int,
    block_size: int,
    compression_block_size: int,
    compression_stride: int,
) -> jax.Array:
    """Importance of each selection block to a group of heads that attends to compressed blocks.

    Sums the heads; selection block j then sums the compressed blocks that share tokens with it,
    each weighted by shared tokens / stride. Blocks of 64 over compressed blocks of 32 every 16
    tokens weigh compressed blocks 4j-1 .. 4j+3 by 1, 2, 2, 2, 1 (NSA, arXiv 2502.11089, with its
    printed indices shifted to where the tokens overlap). Blocks of one size, with a stride equal to
    it, weigh each block by 1: importance is then compressed attention itself.

    Args:
      probabilities: [..., G, C] attention of each head to each compressed block.
      num_blocks: Number of selection blocks, the last one possibly incomplete.
      block_size: Tokens of a selection block, a multiple of compression_stride.
      compression_block_size: Tokens of a compressed block.
      compression_stride: Tokens between the starts of neighbouring compressed blocks.

    Returns:
      [..., num_blocks].
    """
    total = probabilities.sum(-2)
    per_block = block_size // compression_stride
    num_before = -(-compression_block_size // compression_stride) - 1  # reach into j from before it
    needed = num_blocks * per_block
    padding = [(0, 0)] * (total.ndim - 1) + [(num_before, max(0, needed - total.shape[-1]))]
    padded = jnp.pad(total, padding)
    importance = jnp.zeros((*total.shape[:-1], num_blocks), total.dtype)
    for i in range(num_before + per_block):
        first = (i - num_before) * compression_stride  # token, counted from the start of block j
        shared = min(block_size, first + compression_block_size) - max(0, first)
        importance += shared / compression_stride * padded[..., i : i + needed : per_block]
    return importance


def select_blocks(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array,
    num_selected_blocks: int,
    block_size: int,
    compression_block_size: int,
    compression_stride: int,
    queries_per_selection: int,
    segment_ids: jax.Array | None,
    scale: float,
    query_offset: jax.Array | int | None = None,
) -> jax.Array:
    """See `api.select_blocks`."""
    batch, num_queries, num_heads, _ = query.shape
    num_compressed, num_kv_heads = key.shape[1:3]
    length = num_queries if segment_ids is None else segment_ids.shape[1]
    num_blocks = -(-length // block_size)

    def choose(
        query: jax.Array, lse: jax.Array, positions: jax.Array, first_visible: jax.Array
    ) -> jax.Array:
        visible = blocks.complete_blocks(
            positions, first_visible, num_compressed, compression_block_size, compression_stride
        )
        rows = jnp.exp(attention_scores(query, key, scale) - to_rows(lse[..., None], num_kv_heads))
        probabilities = rows.reshape(
            batch, num_kv_heads, query.shape[1], num_heads // num_kv_heads, num_compressed
        )
        importance = block_importance(
            jnp.where(visible[:, None, :, None], probabilities, 0),
            num_blocks=num_blocks,
            block_size=block_size,
            compression_block_size=compression_block_size,
            compression_stride=compression_stride,
        )
        own = jnp.where(first_visible <= positions, positions // block_size, -1)
        own, first = (array[:, None, :, None] for array in (own, first_visible // block_size))
        return choose_blocks(importance, own, first, num_selected_blocks).swapaxes(1, 2)

    arrays = (query, lse, *blocks.query_rows(segment_ids, num_queries, query_offset))
    first_queries = tuple(array[:, ::queries_per_selection] for array in arrays)
    chunk_size = chunking.rows_per_chunk(batch * num_heads * max(num_compressed, num_blocks))
    return chunking.map_chunks(choose, first_queries, chunk_size)


def choose_blocks(importance: jax.Array, own: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """The own block, the one before it, the first, and then the most important in between.

    Args:
      importance: [..., number of blocks].
      own: int [..., 1], the block of the query; -1 for a query of padding, which gets no block.
      first: int [..., 1], the first block of its document.
      count: Length of the list, L.

    Returns:
      int32 [..., L], ascending, then -1; equal importance goes to the lower index.
    """
    block = jnp.arange(importance.shape[-1], dtype=jnp.int32)
    # Distinct ranks: a list too short for all three keeps the nearest.
    forced = [block == own, block == own - 1, block == first]
    ranked = jnp.select(forced, [jnp.inf, 2e30, 1e30], importance)
    ranked = jnp.where((first <= block) & (block <= own), ranked, -jnp.inf)
    return largest(ranked, count)


def largest(values: jax.Array, count: int) -> jax.Array:
    """Indices of the `count` largest values above -inf, ascending, then -1; ties to the lower."""
    size = values.shape[-1]
    top_values, top_indices = jax.lax.top_k(values, min(count, size))
    ascending = jnp.sort(jnp.where(top_values > -jnp.inf, top_indices, size), axis=-1)
    indices = jnp.where(ascending < size, ascending, -1).astype(jnp.int32)
    padding = [(0, 0)] * (values.ndim - 1) + [(0, count - indices.shape[-1])]
    return jnp.pad(indices, padding, constant_values=-1)
