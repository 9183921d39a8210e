"""Caches of blocks: their summaries and the lists of selected ones, by chunks and by tokens."""

import jax
import jax.numpy as jnp

from asa_jax.config import ModelConfig
from asa_jax.model.cached_attention import Chunk
from pallas_kernels.blocks import number_of_blocks
from pallas_kernels.select_blocks.reference import block_importance, choose_blocks


def cut_blocks(x: jax.Array, block_size: int, stride: int) -> jax.Array:
    """The complete blocks of [B, T, ...], one every `stride` tokens: [B, C, block_size, ...]."""
    count = number_of_blocks(x.shape[1], block_size, stride)
    if block_size == stride:
        return x[:, : count * stride].reshape(x.shape[0], count, stride, *x.shape[2:])
    index = stride * jnp.arange(count)[:, None] + jnp.arange(block_size)
    return jnp.take(x, index, axis=1)


def pool_blocks(x: jax.Array, block_size: int, stride: int) -> jax.Array:
    """Means of the complete blocks of [B, T, ...], one every `stride` tokens: [B, C, ...]."""
    return block_mean(cut_blocks(x, block_size, stride), axis=2)


def block_mean(blocks: jax.Array, axis: int) -> jax.Array:
    """Mean over the tokens of a block, summed in at least float32, in the dtype of the blocks."""
    wide = jnp.promote_types(blocks.dtype, jnp.float32)
    return jnp.mean(blocks, axis=axis, dtype=wide).astype(blocks.dtype)


def completed_block(position: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Which compression block ends at `position` [B]: its number, and whether one does."""
    beyond = position + 1 - cfg.compression_block_size
    completes = (beyond >= 0) & (beyond % cfg.compression_stride == 0)
    return beyond // cfg.compression_stride, completes


def visible_blocks(position: jax.Array, num_blocks: int, cfg: ModelConfig) -> jax.Array:
    """Compression blocks that are complete at `position` [B]: bool [B, C]."""
    ends = cfg.compression_stride * jnp.arange(num_blocks) + cfg.compression_block_size - 1
    return ends <= position[:, None]


def update_selection(
    probabilities: jax.Array, position: jax.Array, block_indices: jax.Array, cfg: ModelConfig
) -> jax.Array:
    """The blocks to attend to at `position`: a new list for the first query of a group only.

    Args:
        probabilities: compressed attention of the token, float32 [B, K, G, C].
        position: int [B].
        block_indices: int32 [B, K, L], the list of the previous token.
        cfg: sizes of blocks and lists.

    Returns:
        int32 [B, K, L], ascending, -1 at the end.
    """
    # As many tokens as a cache with this many complete blocks can hold.
    tokens = cfg.compression_stride * probabilities.shape[-1] + cfg.compression_block_size - 1
    importance = block_importance(
        probabilities,
        num_blocks=-(-tokens // cfg.selection_block_size),
        block_size=cfg.selection_block_size,
        compression_block_size=cfg.compression_block_size,
        compression_stride=cfg.compression_stride,
    )
    own = (position // cfg.selection_block_size)[:, None, None]
    fresh = choose_blocks(importance, own, jnp.zeros_like(own), cfg.num_selected_blocks)
    starts_group = (position % cfg.queries_per_selection == 0)[:, None, None]
    return jnp.where(starts_group, fresh, block_indices)


def selected_tokens(
    block_indices: jax.Array, position: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array]:
    """Positions of the tokens of the listed blocks, and which of them may be seen.

    Args:
        block_indices: int32 [B, K, L], -1 for none.
        position: int [B], of the query.
        block_size: tokens of a block.

    Returns:
        int [B, L * block_size, K] positions and bool of the same shape.
    """
    tokens = block_indices[..., None] * block_size + jnp.arange(block_size)
    visible = (block_indices[..., None] >= 0) & (tokens <= position[:, None, None, None])
    shape = (*block_indices.shape[:2], -1)
    tokens, visible = jnp.maximum(tokens, 0).reshape(shape), visible.reshape(shape)
    return jnp.moveaxis(tokens, 1, 2), jnp.moveaxis(visible, 1, 2)


def fill_blocks(
    cache: jax.Array, blocks: jax.Array, chunk: Chunk, size: int, cfg: ModelConfig
) -> jax.Array:
    """Writes the summaries of the blocks that a chunk completes.

    Args:
        cache: [B, C, ...].
        blocks: [B, n, ...], of the blocks that end in the chunk, complete or not.
        chunk: where it stands.
        size: its tokens, T.
        cfg: sizes of blocks.

    Returns:
        The cache.
    """
    ends = chunk.offset + cfg.compression_stride * jnp.arange(1, blocks.shape[1] + 1) - 1
    first = ends + 1 - cfg.compression_block_size
    complete = (chunk.held[:, None] <= ends) & (ends < chunk.after(size)[:, None]) & (first >= 0)
    number = jnp.where(complete, first // cfg.compression_stride, cache.shape[1])
    rows = jnp.arange(cache.shape[0])[:, None]
    return cache.at[rows, number].set(blocks.astype(cache.dtype), mode="drop")


def keep_selection(
    lists: jax.Array, in_force: jax.Array, chunk: Chunk, offset: jax.Array, every: int
) -> jax.Array:
    """Puts the list in force in the place of that of a group which the cache holds the start of.

    Args:
        lists: int32 [B, M, K, L], of groups of queries from position `offset` on.
        in_force: int32 [B, K, L].
        chunk: that the queries are from.
        offset: int32 [].
        every: queries of a group.

    Returns:
        int32 [B, M, K, L].
    """
    first = offset + every * jnp.arange(lists.shape[1])
    held = chunk.held[:, None]
    begun = (first < held) & (held < first + every)
    return jnp.where(begun[..., None, None], in_force[:, None], lists)


def last_selection(
    lists: jax.Array, in_force: jax.Array, chunk: Chunk, size: int, cfg: ModelConfig
) -> jax.Array:
    """The list [B, K, L] in force after a chunk: of the group that holds each row's last token."""
    after = chunk.after(size)
    group = jnp.clip((after - 1 - chunk.offset) // cfg.queries_per_selection, 0, lists.shape[1] - 1)
    last = lists[jnp.arange(lists.shape[0]), group]
    return jnp.where((after > chunk.held)[:, None, None], last, in_force)
