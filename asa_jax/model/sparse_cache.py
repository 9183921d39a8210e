"""What native sparse attention keeps of a row, and how tokens are added to it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from asa_jax.config import ModelConfig
from asa_jax.model.block_cache import completed_block, cut_blocks, fill_blocks, summary_slots
from asa_jax.model.cached_attention import (
    Chunk,
    Keys,
    extend_ring,
    fill,
    recent_row,
    ring_segment_ids,
    write,
    write_if,
)


class KeyValue(NamedTuple):
    """Keys and values [B, S, K, H]."""

    key: jax.Array
    value: jax.Array


# Of keys and values of blocks, [B, C, l, K, H], that start at positions [B, C]: their summaries.
Summarise = Callable[[jax.Array, jax.Array, jax.Array], KeyValue]


class SparseCache(NamedTuple):
    """What the branches keep; None where a branch is absent or reads another's tokens.

    tokens: every rotated key and value, read by selection (and by the window where shared).
    window: ring of the last window_size rotated keys and values.
    recent: ring of the last compression_block_size keys and values, as compression takes them.
    compressed: summaries of the complete blocks.
    block_indices: the list in force, int32 [B, K, L].
    """

    tokens: KeyValue | None
    window: KeyValue | None
    recent: KeyValue | None
    compressed: KeyValue | None
    block_indices: jax.Array | None


def empty_cache(cfg: ModelConfig, batch: int, max_length: int, dtype: jnp.dtype) -> SparseCache:
    """A cache for rows of at most max_length tokens, with none yet."""

    def empty(slots: int) -> KeyValue:
        shape = (batch, slots, cfg.num_kv_heads, cfg.head_dim)
        return KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    compression, selection, window = (
        branch in cfg.nsa_branches for branch in ("compression", "selection", "window")
    )
    own_window = window and not (selection and cfg.nsa_share_kv)
    lists = (batch, cfg.num_kv_heads, cfg.num_selected_blocks)
    return SparseCache(
        tokens=empty(max_length) if selection else None,
        window=empty(min(cfg.window_size, max_length)) if own_window else None,
        recent=empty(cfg.compression_block_size) if compression else None,
        compressed=empty(summary_slots(max_length, cfg)) if compression else None,
        block_indices=jnp.full(lists, -1, jnp.int32) if selection else None,
    )


def append_token(
    cache: SparseCache, pairs: dict[str, KeyValue], position: jax.Array
) -> SparseCache:
    """Writes one token a row, of pairs [B, 1, K, H] a branch, to all but the summaries."""

    def put(part: KeyValue | None, branch: str) -> KeyValue | None:
        if part is None:
            return None
        slot = position % part.key.shape[1]
        return KeyValue(
            *(write(old, slot, new[:, 0]) for old, new in zip(part, pairs[branch], strict=True))
        )

    return cache._replace(
        tokens=put(cache.tokens, "selection"),
        window=put(cache.window, "window"),
        recent=put(cache.recent, "compression"),
    )


def append_chunk(
    cache: SparseCache, pairs: dict[str, KeyValue], chunk: Chunk, cfg: ModelConfig
) -> tuple[SparseCache, KeyValue | None, KeyValue | None]:
    """Writes a chunk of pairs [B, T, K, H] a branch to all but the summaries.

    Returns:
        The cache, and the rows [B, W + T, K, H] that the window and the compression read, W tokens
        from before the chunk.
    """
    window, window_row = _extend(cache.window, pairs.get("window"), chunk)
    recent, recent_tokens = _extend(cache.recent, pairs.get("compression"), chunk)
    tokens = cache.tokens
    if tokens is not None:
        new = zip(tokens, pairs["selection"], strict=True)
        tokens = KeyValue(*(fill(old, array, chunk) for old, array in new))
        if window is None and "window" in cfg.nsa_branches:
            size = pairs["window"].key.shape[1]
            window_row = KeyValue(*(recent_row(a, chunk, cfg.window_size, size) for a in tokens))
    return cache._replace(tokens=tokens, window=window, recent=recent), window_row, recent_tokens


def append_summaries(
    cache: SparseCache,
    recent: KeyValue,
    chunk: Chunk,
    size: int,
    summarise: Summarise,
    cfg: ModelConfig,
) -> SparseCache:
    """Writes the summaries of the blocks that a chunk completes.

    Args:
        cache: to write to.
        recent: tokens of the chunk and compression_block_size before it.
        chunk: where it stands.
        size: its tokens.
        summarise: of the blocks.
        cfg: sizes of blocks.
    """
    block, stride = cfg.compression_block_size, cfg.compression_stride
    key, value = (cut_blocks(array[:, stride:], block, stride) for array in recent)
    starts = chunk.offset + stride - block + stride * jnp.arange(key.shape[1])
    summaries = summarise(key, value, starts[None])
    assert cache.compressed is not None
    compressed = (
        fill_blocks(old, new, chunk, size, cfg)
        for old, new in zip(cache.compressed, summaries, strict=True)
    )
    return cache._replace(compressed=KeyValue(*compressed))


def append_summary(
    cache: SparseCache, position: jax.Array, summarise: Summarise, cfg: ModelConfig
) -> SparseCache:
    """Writes the summary of a block that the token at `position` [B] completes."""
    if cache.recent is None or cache.compressed is None:
        return cache
    block, completes = completed_block(position, cfg)
    size = cfg.compression_block_size
    start = position + 1 - size
    order = (start[:, None] + jnp.arange(size)) % size
    key, value = (
        jnp.take_along_axis(a, order[..., None, None], axis=1)[:, None] for a in cache.recent
    )
    summary = summarise(key, value, start[:, None])
    compressed = (
        write_if(old, block, new[:, 0], completes)
        for old, new in zip(cache.compressed, summary, strict=True)
    )
    return cache._replace(compressed=KeyValue(*compressed))


def window_keys(cache: SparseCache, position: jax.Array, cfg: ModelConfig) -> Keys:
    """Keys and values of the last window_size tokens up to `position` [B], in any order."""
    if cache.window is not None:
        return Keys(*cache.window)
    assert cache.tokens is not None  # the branches share their tokens
    tokens = jnp.maximum(position[:, None] - jnp.arange(cfg.window_size), 0)
    rows = jnp.arange(position.shape[0])[:, None]
    return Keys(*(array[rows, tokens] for array in cache.tokens))


def known_tokens(
    branch: str, row: KeyValue, chunk: Chunk, size: int, cfg: ModelConfig
) -> jax.Array:
    """1 for the tokens that a branch knows of what it reads, 0 for others: int32 [B, S].

    Args:
        branch: its name.
        row: what it reads: summaries, whole rows, or a window and the chunk.
        chunk: where it stands.
        size: its tokens.
        cfg: sizes of blocks.
    """
    if branch == "window":
        return ring_segment_ids(chunk, row.key.shape[1] - size, size)
    if branch == "selection":
        return chunk.segment_ids(row.key.shape[1])
    last = cfg.compression_stride * (row.key.shape[1] - 1)
    return chunk.segment_ids(last + cfg.compression_block_size)


def _extend(
    ring: KeyValue | None, pair: KeyValue | None, chunk: Chunk
) -> tuple[KeyValue | None, KeyValue | None]:
    """The ring with the chunk's tokens, and the row of `extend_ring`."""
    if ring is None or pair is None:
        return None, None
    key, value = (extend_ring(old, new, chunk) for old, new in zip(ring, pair, strict=True))
    return KeyValue(key[1], value[1]), KeyValue(key[0], value[0])
