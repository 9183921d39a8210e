"""Caches of blocks: their summaries and the lists of selected ones, by chunks and by tokens."""

import jax
import jax.numpy as jnp

from asa_jax.config import ModelConfig
from asa_jax.model.cached_attention import TOKEN, Chunk, Keys
from asa_jax.sharding import sharded
from pallas_kernels.blocks import number_of_blocks
from pallas_kernels.cache_arguments import KEYS_MULTIPLE
from pallas_kernels.decode_select_blocks import decode_select_blocks


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


def summary_slots(max_length: int, cfg: ModelConfig) -> int:
    """Slots for the summaries of the blocks of so many tokens, as the kernels take them."""
    count = number_of_blocks(max_length, cfg.compression_block_size, cfg.compression_stride)
    return max(1, -(-count // KEYS_MULTIPLE)) * KEYS_MULTIPLE


def summaries_of(cache: jax.Array, num_tokens: int, cfg: ModelConfig) -> jax.Array:
    """Those [B, C, ...] of a row of so many tokens, of a cache [B, slots, ...]."""
    return cache[
        :, : number_of_blocks(num_tokens, cfg.compression_block_size, cfg.compression_stride)
    ]


def completed_block(position: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Which compression block ends at `position` [B]: its number, and whether one does."""
    beyond = position + 1 - cfg.compression_block_size
    completes = (beyond >= 0) & (beyond % cfg.compression_stride == 0)
    return beyond // cfg.compression_stride, completes


def complete_blocks(position: jax.Array, cfg: ModelConfig) -> jax.Array:
    """How many compression blocks are complete at `position` [B]: int [B]."""
    return jnp.maximum(0, completed_block(position, cfg)[0] + 1)


def update_selection(
    query: jax.Array,
    keys: Keys,
    lse: jax.Array,
    block_indices: jax.Array,
    position: jax.Array,
    cfg: ModelConfig,
    scale: float,
) -> jax.Array:
    """The blocks to attend to at `position`: a new list for the first query of a group only.

    Args:
        query: [B, N, H].
        keys: of compression blocks.
        lse: [B, N], log-sum-exp of the scores of the complete ones.
        block_indices: int32 [B, K, L], the list of the previous token.
        position: int [B].
        cfg: sizes of blocks and lists.
        scale: factor on the scores.

    Returns:
        int32 [B, K, L], ascending, -1 at the end.
    """

    def choose(
        query: jax.Array, keys: Keys, lse: jax.Array, block_indices: jax.Array, lengths: jax.Array
    ) -> jax.Array:
        return decode_select_blocks(
            query, keys.key, lse, block_indices, lengths,
            block_size=cfg.selection_block_size,
            compression_block_size=cfg.compression_block_size,
            compression_stride=cfg.compression_stride,
            queries_per_selection=cfg.queries_per_selection,
            rope_key=keys.rope_key, scale=scale, implementation=cfg.implementation,
        )  # fmt: skip

    axes = keys.axes()
    lists = ("batch", axes.key[2], "block")
    # All heads of a latent count for its list, even if a tensor shard has some of them only.
    heads = TOKEN[:2] if keys.value is not None else ("batch", "groups")
    in_axes = ((*heads, "head_dim"), axes, heads, lists, ("batch",))
    chosen = sharded(choose, in_axes, lists)
    return chosen(query, keys, lse, block_indices, position + 1)


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
