"""Attention of one new token over a cache, and the writing of caches.

A cache array holds tokens on axis 1. Layers with a window keep a ring: token p lies in slot
p % window_size. `position` is that of the new token in its row, so rows may have different lengths.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from asa_jax.config import ModelConfig
from asa_jax.sharding import own_groups, sharded
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_selected_attention import decode_selected_attention

TOKEN = ("batch", "heads", "head_dim")


class Chunk(NamedTuple):
    """Which tokens a prefill of [B, T] reads: those that a row has from `held` on.

    All rows are read at positions offset .. offset + T - 1. A row may hold tokens there already,
    and may end before or within; what the chunk gives at such positions is ignored, and nothing of
    it is kept.

    Attributes:
        offset: int32 [], a multiple of the alignment; offset + T is at most the cache's length.
        held: int32 [B], tokens that the cache holds, none of them behind the chunk.
        lengths: int32 [B], tokens of the rows with all that will be read.
    """

    offset: Any
    held: Any
    lengths: Any

    def after(self, size: int) -> jax.Array:
        """Tokens [B] that the cache holds after a chunk of `size` tokens."""
        return jnp.maximum(self.held, jnp.minimum(self.lengths, self.offset + size))

    def positions(self, size: int, before: int = 0) -> jax.Array:
        """Positions [before + size] of the chunk's tokens and of those before them."""
        return self.offset - before + jnp.arange(before + size)

    def is_new(self, size: int) -> jax.Array:
        """Which tokens are to be read: bool [B, size]."""
        positions = self.positions(size)
        return (self.held[:, None] <= positions) & (positions < self.lengths[:, None])

    def segment_ids(self, cache_length: int) -> jax.Array:
        """1 for the tokens of whole rows, 0 behind them: int32 [B, S]."""
        return (jnp.arange(cache_length) < self.lengths[:, None]).astype(jnp.int32)


# Logical axes of the arrays of a chunk, for `sharding.sharded`.
CHUNK = Chunk((), ("batch",), ("batch",))


def ring_positions(position: jax.Array, window_size: int) -> jax.Array:
    """Position of the newest token of each ring slot, up to `position`; negative where empty.

    Args:
        position: int [B], position of the newest token written.
        window_size: number of slots.

    Returns:
        int [B, window_size].
    """
    slots = jnp.arange(window_size)
    return position[:, None] - (position[:, None] - slots) % window_size


def fill(cache: jax.Array, tokens: jax.Array, chunk: Chunk) -> jax.Array:
    """Writes the new ones of a chunk's tokens [B, T, ...] to a cache [B, S, ...]."""
    size = tokens.shape[1]
    old = jax.lax.dynamic_slice_in_dim(cache, chunk.offset, size, axis=1)
    new = jnp.where(_over(chunk.is_new(size), tokens), tokens.astype(cache.dtype), old)
    return jax.lax.dynamic_update_slice_in_dim(cache, new, chunk.offset, axis=1)


def extend_ring(cache: jax.Array, tokens: jax.Array, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """Writes the new ones of a chunk's tokens to a ring.

    Args:
        cache: [B, W, ...].
        tokens: [B, T, ...].
        chunk: where they stand.

    Returns:
        The tokens of positions offset - W .. offset + T - 1, [B, W + T, ...], as far as they are
        known (`ring_segment_ids`), and the ring that keeps the last of them.
    """
    slots, size = cache.shape[1], tokens.shape[1]
    positions = chunk.positions(size, before=slots)
    ring = jnp.take(cache, positions % slots, axis=1)
    new = jnp.pad(tokens, ((0, 0), (slots, 0), *((0, 0) for _ in tokens.shape[2:])))
    row = jnp.where(_over(positions < chunk.held[:, None], ring), ring, new.astype(cache.dtype))

    after = chunk.after(size)
    index = jnp.clip(ring_positions(after - 1, slots) - positions[0], 0, slots + size - 1)
    last = jnp.take_along_axis(row, index.reshape(index.shape + (1,) * (row.ndim - 2)), axis=1)
    return row, jnp.where(_over((after > chunk.held)[:, None], row), last, cache)


def ring_segment_ids(chunk: Chunk, slots: int, size: int) -> jax.Array:
    """1 for the tokens of `extend_ring`'s row that are known, 0 for others: int32 [B, W + T]."""
    positions = chunk.positions(size, before=slots)
    known = jnp.maximum(chunk.held[:, None] - slots, 0) <= positions
    return (known & (positions < chunk.lengths[:, None])).astype(jnp.int32)


def recent_row(cache: jax.Array, chunk: Chunk, window_size: int, size: int) -> jax.Array:
    """Tokens of positions offset - window_size .. offset + T - 1 of a cache of whole rows."""
    return jnp.take(cache, jnp.maximum(chunk.positions(size, before=window_size), 0), axis=1)


def _over(mask: jax.Array, like: jax.Array) -> jax.Array:
    """A mask [B, T] as it broadcasts over [B, T, ...]."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - 2))


def write(cache: jax.Array, slot: jax.Array, token: jax.Array) -> jax.Array:
    """Writes one token [B, ...] a row to slot [B] of a cache [B, S, ...]."""
    if cache.shape[0] == 1:
        # As a scatter XLA would read the old token first, in kernels of their own.
        return jax.lax.dynamic_update_slice_in_dim(
            cache, token[:, None].astype(cache.dtype), slot[0], axis=1
        )
    return cache.at[jnp.arange(cache.shape[0]), slot].set(token.astype(cache.dtype))


def write_if(cache: jax.Array, slot: jax.Array, token: jax.Array, keep: jax.Array) -> jax.Array:
    """As `write`, in the rows where `keep` [B] holds."""
    rows = jnp.arange(cache.shape[0])
    slot = jnp.clip(slot, 0, cache.shape[1] - 1)
    keep = keep.reshape(keep.shape + (1,) * (token.ndim - 1))
    return write(cache, slot, jnp.where(keep, token.astype(cache.dtype), cache[rows, slot]))


def pad_rows(x: jax.Array, num_rows: int) -> jax.Array:
    """Rows [B, ...] and copies of the last of them, `num_rows` together."""
    missing = num_rows - x.shape[0]
    return jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:])), mode="edge")


class Keys(NamedTuple):
    """What one new token a row attends to.

    Attributes:
        key: [B, S, K, R].
        value: [B, S, K, h]; None for latents, which are keys and values.
        rope_key: what the heads share of a key, [B, S, HR]; None where there is none.
    """

    key: Any
    value: Any = None
    rope_key: Any = None

    def axes(self) -> "Keys":
        """Logical axes; every tensor shard has all latents."""
        heads = ("groups", "latent") if self.value is None else ("kv_heads", "head_dim")
        key = ("batch", "row", *heads)
        rope_key = None if self.rope_key is None else ("batch", "row", "latent")
        return Keys(key, None if self.value is None else key, rope_key)

    def own(self) -> "Keys":
        """Those of the heads of this tensor shard, inside `sharded`."""
        return self if self.value is not None else self._replace(key=own_groups(self.key))


def attend_cache(
    query: jax.Array,
    keys: Keys,
    lengths: jax.Array,
    scale: float,
    implementation: Literal["xla"] | None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of one query a row to the first `lengths` keys.

    Args:
        query: [B, N, R + HR].
        keys: of whole rows.
        lengths: int [B].
        scale: factor on the scores.
        implementation: of the operation; None for the best.

    Returns:
        The output [B, N, h], zero where there is no key, and the log-sum-exp of scores [B, N].
    """

    def attend(query: jax.Array, keys: Keys, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        key, value, rope_key = keys.own()
        return decode_attention(
            query, key, value, lengths,
            rope_key=rope_key, scale=scale, implementation=implementation,
        )  # fmt: skip

    in_axes = (TOKEN, keys.axes(), ("batch",))
    return sharded(attend, in_axes, (TOKEN, TOKEN[:2]))(query, keys, lengths)


def attend_blocks(
    query: jax.Array,
    keys: Keys,
    block_indices: jax.Array,
    lengths: jax.Array,
    cfg: ModelConfig,
    scale: float,
) -> jax.Array:
    """Softmax attention of one query a row to those of the first `lengths` keys in listed blocks.

    Args:
        query: [B, N, R + HR].
        keys: of whole rows.
        block_indices: int32 [B, K, L], ascending, -1 at the end.
        lengths: int [B].
        cfg: size of blocks.
        scale: factor on the scores.

    Returns:
        The output [B, N, h].
    """

    def attend(
        query: jax.Array, keys: Keys, block_indices: jax.Array, lengths: jax.Array
    ) -> jax.Array:
        if keys.value is None:
            block_indices = own_groups(block_indices[:, None])[:, 0]
        key, value, rope_key = keys.own()
        output, _ = decode_selected_attention(
            query, key, value, block_indices, lengths, block_size=cfg.selection_block_size,
            rope_key=rope_key, scale=scale, implementation=cfg.implementation,
        )  # fmt: skip
        return output

    axes = keys.axes()
    in_axes = (TOKEN, axes, ("batch", axes.key[2], "block"), ("batch",))
    return sharded(attend, in_axes, TOKEN)(query, keys, block_indices, lengths)
