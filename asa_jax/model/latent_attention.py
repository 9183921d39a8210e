"""Multi-head latent attention, over the whole document or a sliding window: kinds `mla`, `local`.

DeepSeek-V2 (arXiv 2405.04434), equations 9 to 19:

    c_t     = RMSNorm(W_DKV x_t)             [R]    the cached latent (`latent_norm`: the norm)
    kR_t    = RoPE(W_KR x_t)                 [HR]   one rotated key a token, shared by the heads
    k_{t,n} = [W_UK,n c_t ; kR_t]            v_{t,n} = W_UV,n c_t
    q_{t,n} = [qC_{t,n} ; RoPE(qR_{t,n})]    from x_t, or from a latent RMSNorm(W_DQ x_t)
    o_{t,n} = sum_j softmax_j(q_{t,n} . k_{j,n} / sqrt(HC + HR)) v_{j,n}

Absorbed form, the same numbers: q'_n = W_UK,n^T qC_n scores latents directly, and W_UV,n is applied
to the weighted sum of latents. Training expands the keys, decoding absorbs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.context_parallel import (
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

LATENT = ("batch", "sequence", "latent")
LATENT_ROW = ("batch", "row", "latent")
UP_AXES = ("latent", "heads", "head_dim")


class LatentCache(NamedTuple):
    """Latents [B, S, R] and rotated keys [B, S, HR]; S is the window size if there is a window."""

    latent: jax.Array
    rope_key: jax.Array


class DecoupledQuery(nnx.Module):
    """Queries with a position-free and a rotated part, full rank or through a latent."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        std, size, rank = cfg.init_stddev, cfg.hidden_size, cfg.q_lora_rank
        if rank:
            bias = (1,) if cfg.attention_bias else ()
            self.down = Projection((size, rank), ("embed", "latent"), std, bias=bias, rngs=rngs)
            self.norm = RMSNorm(rank, cfg.latent_norm_epsilon)
        size, axis = (rank, "latent") if rank else (size, "embed")
        head_dim = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
        self.up = Projection(
            (size, cfg.num_heads, head_dim), (axis, "heads", "head_dim"), std, rngs=rngs
        )

    def __call__(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps x [B, T, D] to position-free [B, T, N, HC] and rotated [B, T, N, HR] queries."""
        first = self.down("BTD,DR->BTR", x) if self.cfg.q_lora_rank else None
        return self.finish(self.up("BTD,DNH->BTNH", x) if first is None else first, positions)

    @property
    def first(self) -> Projection:
        """The projection that takes x."""
        return self.down if self.cfg.q_lora_rank else self.up

    def finish(self, query: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `__call__`, of what `first` makes of x."""
        if self.cfg.q_lora_rank:
            query = self.up("BTD,DNH->BTNH", self.norm(query))
        query = constrain(query, "batch", "sequence", "heads", "head_dim")
        nope, rope = jnp.split(query, [self.cfg.qk_nope_head_dim], axis=-1)
        return nope, rotate(rope, positions, self.cfg.rope_theta, self.cfg.rope_scaling)


class LatentAttention(nnx.Module):
    """MLA; see the module's equations."""

    def __init__(self, cfg: ModelConfig, window_size: int | None, *, rngs: nnx.Rngs) -> None:
        self.cfg, self.window_size = cfg, window_size
        size, rank, heads, std = cfg.hidden_size, cfg.kv_lora_rank, cfg.num_heads, cfg.init_stddev
        self.query = DecoupledQuery(cfg, rngs=rngs)
        bias = (1,) if cfg.attention_bias else ()
        self.down = Projection((size, rank), ("embed", "latent"), std, bias=bias, rngs=rngs)
        self.norm = RMSNorm(rank, cfg.latent_norm_epsilon) if cfg.latent_norm else None
        self.rope_key = Projection(
            (size, cfg.qk_rope_head_dim), ("embed", "head_dim"), std, bias=bias, rngs=rngs
        )
        self.key_up = Projection((rank, heads, cfg.qk_nope_head_dim), UP_AXES, std, rngs=rngs)
        self.value_up = Projection((rank, heads, cfg.v_head_dim), UP_AXES, std, rngs=rngs)
        self.output = Projection(
            (heads, cfg.v_head_dim, size), ("heads", "head_dim", "embed"), residual_stddev(cfg),
            bias=(2,) if cfg.attention_bias else (), rngs=rngs,
        )  # fmt: skip
        self.scale = cfg.score_scale(cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
        self.joined: JoinedProjections | None = nnx.data(None)

    def join(self) -> None:
        """Joins what multiplies the same vectors, for a loop of steps with few of them."""
        self.joined = join((self.query.first, 0), (self.down, 0), (self.rope_key, 0))

    def __call__(self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; positions and segment_ids int [B, T]."""
        nope, rope = self.query(x, positions)
        latent, rope_key = self._compress(x, positions)
        output = self._attend(nope, rope, latent, rope_key, segment_ids)
        return self.output("BTNH,NHD->BTD", output)

    def init_cache(self, batch: int, max_length: int, dtype: jnp.dtype) -> LatentCache:
        """An empty cache for rows of at most max_length tokens."""
        slots = max_length if self.window_size is None else min(self.window_size, max_length)
        return LatentCache(
            jnp.zeros((batch, slots, self.cfg.kv_lora_rank), dtype),
            jnp.zeros((batch, slots, self.cfg.qk_rope_head_dim), dtype),
        )

    def prefill(
        self, x: jax.Array, positions: jax.Array, chunk: Chunk, cache: LatentCache
    ) -> tuple[jax.Array, LatentCache]:
        """Maps a chunk of tokens, [B, T, D] at positions [B, T], and appends it to the cache."""
        query = jnp.concatenate(self.query(x, positions), axis=-1)
        new = [in_row_order(array, *LATENT) for array in self._compress(x, positions)]
        row = (QUERY, LATENT_ROW, LATENT_ROW, UP_AXES, UP_AXES, SEGMENT_IDS)
        if self.window_size is None:
            cache = LatentCache(*(fill(old, a, chunk) for old, a in zip(cache, new, strict=True)))
            attend = sharded(self._attend_rows, (*row, ()), QUERY)
            segment_ids = chunk.segment_ids(cache.latent.shape[1])
            output = attend(query, *cache, *self._up(x.dtype), segment_ids, chunk.offset)
        else:
            segment_ids = ring_segment_ids(chunk, cache.latent.shape[1], x.shape[1])
            rows, rings = zip(
                *(extend_ring(old, a, chunk) for old, a in zip(cache, new, strict=True)),
                strict=True,
            )
            cache = LatentCache(*rings)
            attend = sharded(self._attend_recent, row, QUERY)
            output = attend(query, *rows, *self._up(x.dtype), segment_ids)
        return self.output("BTNH,NHD->BTD", output), cache

    def decode(
        self, x: jax.Array, position: jax.Array, cache: LatentCache
    ) -> tuple[jax.Array, LatentCache]:
        """Maps one token a row, [B, D] at position [B], to [B, D], and appends it to the cache."""
        rows, padded = position.size, pad_rows(position, x.shape[0])[:, None]
        query, latent, rope_key = (a[:rows] for a in self.project_absorbed(x[:, None], padded))
        slots = cache.latent.shape[1]
        cache = LatentCache(
            write(cache.latent, position % slots, latent[:, 0]),
            write(cache.rope_key, position % slots, rope_key[:, 0]),
        )
        keys = Keys(cache.latent[:, :, None], rope_key=cache.rope_key)
        lengths = jnp.minimum(position + 1, slots)
        mixed, _ = attend_cache(query[:, 0], keys, lengths, self.scale, self.cfg.implementation)
        mixed = pad_rows(mixed, x.shape[0])
        return self.output("BNH,NHD->BD", self.value_up("BNR,RNH->BNH", mixed)), cache

    def project_absorbed(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        """Absorbed queries [B, T, N, R + HR], latents and rotated keys of tokens [B, T, D]."""
        if self.joined is None:
            (nope, rope), compressed = self.query(x, positions), self._compress(x, positions)
        else:
            query, latent, rope_key = self.joined(x)
            nope, rope = self.query.finish(query, positions)
            compressed = place(self.norm, latent, rope_key, positions, self.cfg)
        query = jnp.concatenate([self.key_up("BTNH,RNH->BTNR", nope), rope], axis=-1)
        return query, *compressed

    def _compress(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        rope_key = self.rope_key("BTD,DH->BTH", x)
        return place(self.norm, self.down("BTD,DR->BTR", x), rope_key, positions, self.cfg)

    def _attend(
        self,
        nope: jax.Array,
        rope: jax.Array,
        latent: jax.Array,
        rope_key: jax.Array,
        segment_ids: jax.Array,
    ) -> jax.Array:
        """Attention over expanded keys and values: [B, T, N, h]."""
        attend = sharded(
            self._attend_part, (QUERY, LATENT, LATENT, UP_AXES, UP_AXES, SEGMENT_IDS), QUERY
        )
        query = jnp.concatenate([nope, rope], axis=-1)
        return attend(query, latent, rope_key, *self._up(latent.dtype), segment_ids)

    def _up(self, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
        return tuple(w.weight[...].astype(dtype) for w in (self.key_up, self.value_up))

    def _attend_part(
        self,
        query: jax.Array,
        latent: jax.Array,
        rope_key: jax.Array,
        key_up: jax.Array,
        value_up: jax.Array,
        segment_ids: jax.Array,
    ) -> jax.Array:
        """Attention of one device's heads and part of each row; latents travel, not keys."""
        up = key_up, value_up
        if self.window_size is None:
            latent, rope_key = gather_rows(latent, rope_key)
            return self._attend_rows(query, latent, rope_key, *up, segment_ids)
        halo, attend = self.window_size - 1, functools.partial(self._attend_window, *up)
        return map_windows(attend, halo, (query,), (latent, rope_key), segment_ids)

    def _attend_rows(
        self,
        query: jax.Array,
        latent: jax.Array,
        rope_key: jax.Array,
        key_up: jax.Array,
        value_up: jax.Array,
        segment_ids: jax.Array,
        offset: jax.Array | None = None,
    ) -> jax.Array:
        """Attention of a part of the queries, the first of which stands at `offset`, to rows."""
        key, value = _expand(latent, rope_key, key_up, value_up)
        return map_queries(
            lambda query, offset: causal_attention(
                query, key, value, segment_ids, self.scale, offset, self.cfg.implementation
            ),
            query,
            offset=offset,
        )

    def _attend_recent(
        self,
        query: jax.Array,
        latent: jax.Array,
        rope_key: jax.Array,
        key_up: jax.Array,
        value_up: jax.Array,
        segment_ids: jax.Array,
    ) -> jax.Array:
        """Attention of a part of a chunk's queries to rows of a window and the chunk."""
        before = latent.shape[1] - query.shape[1] * context_size()
        row = latent, rope_key, segment_ids
        return map_queries(
            lambda query, offset: self._attend_window(key_up, value_up, query, *row, offset),
            query,
            offset=before,
        )

    def _attend_window(
        self,
        key_up: jax.Array,
        value_up: jax.Array,
        query: jax.Array,
        latent: jax.Array,
        rope_key: jax.Array,
        segment_ids: jax.Array,
        offset: jax.Array | int | None = None,
    ) -> jax.Array:
        assert self.window_size is not None
        key, value = _expand(latent, rope_key, key_up, value_up)
        output, _ = sliding_window_attention(
            query, key, value, window_size=self.window_size, segment_ids=segment_ids,
            query_offset=offset, scale=self.scale, implementation=self.cfg.implementation,
        )  # fmt: skip
        return output


def place(
    norm: RMSNorm | None,
    latent: jax.Array,
    rope_key: jax.Array,
    positions: jax.Array,
    cfg: ModelConfig,
) -> tuple[jax.Array, jax.Array]:
    """Normalised latents [B, T, ..., R] and rotated keys [B, T, HR]."""
    if norm is not None:
        latent = norm(latent)
    rotated = rotate(rope_key[:, :, None], positions, cfg.rope_theta, cfg.rope_scaling)
    return latent, rotated[:, :, 0]


def _expand(
    latent: jax.Array, rope_key: jax.Array, key_up: jax.Array, value_up: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys [B, T, N, HC + HR] and values [B, T, N, h] of latents [B, T, R]."""
    key = jnp.einsum("BTR,RNH->BTNH", latent, key_up)
    shared = jnp.broadcast_to(rope_key[:, :, None], (*key.shape[:3], rope_key.shape[-1]))
    key = jnp.concatenate([key, shared], axis=-1)
    return key, jnp.einsum("BTR,RNH->BTNH", latent, value_up)
