"""Grouped-query attention, over the whole document or a sliding window: kinds `full`, `sliding`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.context_parallel import (
    KEY,
    KEY_ROW,
    QUERY,
    SEGMENT_IDS,
    context_size,
    gather_rows,
    in_row_order,
    map_queries,
    map_windows,
)
from asa_jax.model.cached_attention import (
    Chunk,
    Keys,
    attend_cache,
    extend_ring,
    fill,
    pad_rows,
    ring_segment_ids,
    write,
)
from asa_jax.model.causal_attention import causal_attention
from asa_jax.model.layers import JoinedProjections, Projection, RMSNorm, join, residual_stddev
from asa_jax.model.rope import rotate
from asa_jax.sharding import constrain, sharded
from pallas_kernels.sliding_window_attention import sliding_window_attention


class GroupedQueryCache(NamedTuple):
    """Rotated keys and values [B, S, K, H]; S is the window size where there is a window."""

    key: jax.Array
    value: jax.Array


class GroupedQueryAttention(nnx.Module):
    """softmax(q k^T / sqrt(H)) v, N query heads over K key/value heads (arXiv 2305.13245).

    With `qk_norm` an RMSNorm over the features of each head precedes RoPE (Qwen3).
    """

    def __init__(self, cfg: ModelConfig, window_size: int | None, *, rngs: nnx.Rngs) -> None:
        self.cfg, self.window_size = cfg, window_size
        into = (cfg.hidden_size, cfg.num_heads, cfg.head_dim)
        kv = (2, cfg.hidden_size, cfg.num_kv_heads, cfg.head_dim)
        std, bias = cfg.init_stddev, cfg.attention_bias
        self.query = Projection(
            into, ("embed", "heads", "head_dim"), std, bias=(1, 2) if bias else (), rngs=rngs
        )
        self.key_value = Projection(
            kv, ("pair", "embed", "kv_heads", "head_dim"), std, bias=(0, 2, 3) if bias else (),
            rngs=rngs,
        )  # fmt: skip
        self.output = Projection(
            (*into[1:], into[0]), ("heads", "head_dim", "embed"), residual_stddev(cfg),
            bias=(2,) if bias else (), rngs=rngs,
        )  # fmt: skip
        norm = functools.partial(RMSNorm, cfg.head_dim, cfg.norm_epsilon, axis="head_dim")
        self.query_norm = norm() if cfg.qk_norm else None
        self.key_norm = norm() if cfg.qk_norm else None
        self.scale = cfg.score_scale(cfg.head_dim)
        self.joined: JoinedProjections | None = nnx.data(None)

    def join(self) -> None:
        """Joins what multiplies the same vectors, for a loop of steps with few of them."""
        self.joined = join((self.query, 0), (self.key_value, 1))

    def __call__(self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; positions and segment_ids int [B, T]."""
        query, key, value = self.project(x, positions)
        return self._attend(query, key, value, segment_ids)

    def init_cache(self, batch: int, max_length: int, dtype: jnp.dtype) -> GroupedQueryCache:
        """An empty cache for rows of at most max_length tokens."""
        slots = max_length if self.window_size is None else min(self.window_size, max_length)
        shape = (batch, slots, self.cfg.num_kv_heads, self.cfg.head_dim)
        return GroupedQueryCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def prefill(
        self, x: jax.Array, positions: jax.Array, chunk: Chunk, cache: GroupedQueryCache
    ) -> tuple[jax.Array, GroupedQueryCache]:
        """Maps a chunk of tokens, [B, T, D] at positions [B, T], and appends it to the cache."""
        query, *new = self.project(x, positions)
        key, value = (in_row_order(array, *KEY) for array in new)
        if self.window_size is None:
            cache = GroupedQueryCache(fill(cache.key, key, chunk), fill(cache.value, value, chunk))
            attend = sharded(self._attend_rows, (QUERY, KEY_ROW, KEY_ROW, SEGMENT_IDS, ()), QUERY)
            segment_ids = chunk.segment_ids(cache.key.shape[1])
            output = attend(query, *cache, segment_ids, chunk.offset)
        else:
            segment_ids = ring_segment_ids(chunk, cache.key.shape[1], x.shape[1])
            (key, key_ring), (value, value_ring) = (
                extend_ring(ring, array, chunk)
                for ring, array in zip(cache, (key, value), strict=True)
            )
            cache = GroupedQueryCache(key_ring, value_ring)
            attend = sharded(self._attend_recent, (QUERY, KEY_ROW, KEY_ROW, SEGMENT_IDS), QUERY)
            output = attend(query, key, value, segment_ids)
        return self.output("BTNH,NHD->BTD", output), cache

    def decode(
        self, x: jax.Array, position: jax.Array, cache: GroupedQueryCache
    ) -> tuple[jax.Array, GroupedQueryCache]:
        """Maps one token a row, [B, D] at position [B], to [B, D], and appends it to the cache."""
        rows, padded = position.size, pad_rows(position, x.shape[0])[:, None]
        query, key, value = (a[:rows] for a in self.project(x[:, None], padded))
        slots = cache.key.shape[1]
        slot = position % slots
        cache = GroupedQueryCache(
            write(cache.key, slot, key[:, 0]), write(cache.value, slot, value[:, 0])
        )
        lengths = jnp.minimum(position + 1, slots)
        output, _ = attend_cache(
            query[:, 0], Keys(*cache), lengths, self.scale, self.cfg.implementation
        )
        return self.output("BNH,NHD->BD", pad_rows(output, x.shape[0])), cache

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        """Rotated queries [B, T, N, H] and keys, and values, of tokens [B, T, D]."""
        if self.joined is None:
            query = self.query("BTD,DNH->BTNH", x)
            key, value = self.key_value("BTD,PDKH->PBTKH", x)
        else:
            query, pair = self.joined(x)
            key, value = jnp.moveaxis(pair, 2, 0)
        query = constrain(query, "batch", "sequence", "heads", "head_dim")
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        rope = self.cfg.rope_theta, self.cfg.rope_scaling
        return rotate(query, positions, *rope), rotate(key, positions, *rope), value

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        attend = sharded(self._attend_part, (QUERY, KEY, KEY, SEGMENT_IDS), QUERY)
        return self.output("BTNH,NHD->BTD", attend(query, key, value, segment_ids))

    def _attend_part(
        self, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        """Attention of one device's heads and part of each row: [B, T, N, h]."""
        if self.window_size is None:
            key, value = gather_rows(key, value)
            return self._attend_rows(query, key, value, segment_ids)
        halo = self.window_size - 1
        return map_windows(self._attend_window, halo, (query,), (key, value), segment_ids)

    def _attend_rows(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array,
        offset: jax.Array | None = None,
    ) -> jax.Array:
        """Attention of a part of the queries, the first of which stands at `offset`, to rows."""
        return map_queries(
            lambda query, offset: causal_attention(
                query, key, value, segment_ids, self.scale, offset, self.cfg.implementation
            ),
            query,
            offset=offset,
        )  # fmt: skip

    def _attend_recent(
        self, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        """Attention of a part of a chunk's queries to rows of a window and the chunk."""
        before = key.shape[1] - query.shape[1] * context_size()
        return map_queries(
            lambda query, offset: self._attend_window(query, key, value, segment_ids, offset),
            query,
            offset=before,
        )

    def _attend_window(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array,
        offset: jax.Array | int | None = None,
    ) -> jax.Array:
        assert self.window_size is not None
        output, _ = sliding_window_attention(
            query, key, value, window_size=self.window_size, segment_ids=segment_ids,
            query_offset=offset, scale=self.scale, implementation=self.cfg.implementation,
        )  # fmt: skip
        return output
