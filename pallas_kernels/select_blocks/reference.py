"""Definition of select_blocks in XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels import blocks, chunking
from pallas_kernels.masked_attention import attention_scores, split_heads


def block_importance(
    probabilities: jax.Array,
    *,
    num_blocks: int,
    block_size: int,
    compression_block_size: int,
    compression_stride: int,
) -> jax.Array:
    """Importance of each selection block to a group of heads that attends to compressed blocks.

    Sums the heads; selection block j then sums the compressed blocks that share tokens with it, each weighted by
    shared tokens / stride. Blocks of 64 over compressed blocks of 32 every 16 tokens weigh compressed blocks
    4j-1 .. 4j+3 by 1, 2, 2, 2, 1 (NSA, arXiv 2502.11089, equation 9, with its indices shifted to where the tokens
    overlap). One block size for both and a stride equal to it is the identity.

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
) -> jax.Array:
    """See `api.select_blocks`."""
    batch, length, num_heads, _ = query.shape
    num_kv_heads = key.shape[2]
    num_blocks = -(-length // block_size)

    def choose(query, lse, positions, segments, starts):
        scores = attention_scores(split_heads(query, num_kv_heads), key, scale)
        lse = lse.reshape(*lse.shape[:2], num_kv_heads, -1).transpose(0, 2, 1, 3)
        visible = blocks.visible_blocks(
            positions,
            segments,
            segment_ids,
            key.shape[1],
            compression_block_size,
            compression_stride,
        )
        probabilities = jnp.where(visible[:, None, :, None], jnp.exp(scores - lse[..., None]), 0)
        importance = block_importance(
            probabilities,
            num_blocks=num_blocks,
            block_size=block_size,
            compression_block_size=compression_block_size,
            compression_stride=compression_stride,
        )
        own = positions // block_size
        if segments is not None:
            own = jnp.where(segments > 0, own, -1)
        first = jnp.zeros_like(own) if starts is None else starts // block_size
        own, first = (x[:, None, :, None] for x in (own, first))
        chosen = choose_blocks(importance, own, first, num_selected_blocks)
        return chosen.transpose(0, 2, 1, 3)

    every = slice(None, None, queries_per_selection)
    arrays = (
        query[:, every],
        lse[:, every],
        blocks.token_positions(length)[:, every],
        None if segment_ids is None else segment_ids[:, every],
        None if segment_ids is None else blocks.document_starts(segment_ids)[:, every],
    )
    chunk_size = chunking.rows_per_chunk(batch * num_heads * max(key.shape[1], num_blocks))
    return chunking.map_chunks(choose, arrays, chunk_size)


def choose_blocks(
    importance: jax.Array, own: jax.Array, first: jax.Array, count: int
) -> jax.Array:
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
    """Indices of the `count` largest values above -inf, ascending, then -1; ties to the lower index."""
    size = values.shape[-1]
    top_values, top_indices = jax.lax.top_k(values, min(count, size))
    ascending = jnp.sort(jnp.where(top_values > -jnp.inf, top_indices, size), axis=-1)
    indices = jnp.where(ascending < size, ascending, -1).astype(jnp.int32)
    padding = [(0, 0)] * (values.ndim - 1) + [(0, count - indices.shape[-1])]
    return jnp.pad(indices, padding, constant_values=-1)
