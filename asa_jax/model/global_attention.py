"""Compression and block selection over grouped latents: kind `global`, ASA's second half.

Assembled from Grouped Latent Attention (arXiv 2505.21487) and NSA (arXiv 2502.11089). Latent group
k serves the G = N / K query heads n of its group:

    c^k_t  = RMSNorm(W^k_DKV x_t)  [R]          kR_t = RoPE(W_KR x_t)  [HR], shared by the groups
    c~^k_j = mean of c^k over block j           kR~_j = mean of kR over block j
    p_n    = softmax_j(q_n . [W_UK,n c~^k_j ; kR~_j] * scale)   over complete blocks
    I^k    = first, previous, own block and the most important by sum over the group of p_n
    o_n    = g^cmp_n W_UV,n sum_j p_nj c~^k_j + g^slc_n W_UV,n (attention over the tokens of I^k)

The mean commutes with the up-projections, so latents are pooled. Training and decoding both use
the absorbed form, q'_n = [W_UK,n^T qC_n ; qR_n] against latents: one fetch serves a whole group.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.context_parallel import QUERY, SEGMENT_IDS, gather_rows, in_row_order, map_queries
from asa_jax.model.block_cache import (
    block_mean,
    complete_blocks,
    completed_block,
    fill_blocks,
    keep_selection,
    last_selection,
    pool_blocks,
    summaries_of,
    summary_slots,
    update_selection,
)
from asa_jax.model.cached_attention import (
    CHUNK,
    Chunk,
    Keys,
    attend_blocks,
    attend_cache,
    fill,
    pad_rows,
    write,
    write_if,
)
from asa_jax.model.latent_attention import DecoupledQuery, place
from asa_jax.model.layers import JoinedProjections, Projection, RMSNorm, join, residual_stddev
from asa_jax.sharding import gather_group, own_groups, sharded, shards_per_group
from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.selected_attention import selected_attention

# Logical axes of latents and rotated keys, and of their block means; and of lists of blocks.
LATENTS = (("batch", "sequence", "groups", "latent"), ("batch", "sequence", "latent"))
LATENT_ROWS = (("batch", "row", "groups", "latent"), ("batch", "row", "latent"))
LISTS = ("batch", "sequence", "heads", "block")
LIST_IN_FORCE = ("batch", "row", "groups", "block")


class GlobalCache(NamedTuple):
    """Latents [B, S, K, R], rotated keys [B, S, HR], their block means, and the list in force."""

    latent: jax.Array
    rope_key: jax.Array
    compressed_latent: jax.Array
    compressed_rope_key: jax.Array
    block_indices: jax.Array


class GroupLatentAttention(nnx.Module):
    """GLA with compression and selection; see the module's equations."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        size, rank, std = cfg.hidden_size, cfg.group_kv_lora_rank, cfg.init_stddev
        groups, heads = cfg.num_latent_groups, cfg.num_heads
        up_axes = ("latent", "heads", "head_dim")
        self.query = DecoupledQuery(cfg, rngs=rngs)
        self.down = Projection((size, groups, rank), ("embed", "groups", "latent"), std, rngs=rngs)
        self.norm = RMSNorm(rank, cfg.latent_norm_epsilon) if cfg.latent_norm else None
        self.rope_key = Projection(
            (size, cfg.qk_rope_head_dim), ("embed", "head_dim"), std, rngs=rngs
        )
        self.key_up = Projection((rank, heads, cfg.qk_nope_head_dim), up_axes, std, rngs=rngs)
        self.value_up = Projection((rank, heads, cfg.v_head_dim), up_axes, std, rngs=rngs)
        self.gates = Projection((size, heads, 2), ("embed", "heads", "gates"), std, rngs=rngs)
        self.output = Projection(
            (heads, cfg.v_head_dim, size), ("heads", "head_dim", "embed"), residual_stddev(cfg),
            rngs=rngs,
        )  # fmt: skip
        self.scale = cfg.score_scale(cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
        self.joined: JoinedProjections | None = nnx.data(None)

    def join(self) -> None:
        """Joins what multiplies the same vectors, for a loop of steps with few of them."""
        self.joined = join(
            (self.query.first, 0), (self.down, 0), (self.rope_key, 0), (self.gates, 0)
        )

    def __call__(self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D].

        Args:
            x: [B, T, D].
            positions: int [B, T], from the start of each document.
            segment_ids: int [B, T], 0 for padding; documents start at multiples of a block.

        Returns:
            [B, T, D].
        """
        query = self._absorb(*self.query(x, positions))
        latent, rope_key = self._compress(x, positions)
        compressed = self._pool(latent), self._pool(rope_key)
        mixed = self._attend(query, self._gate(x), latent, rope_key, *compressed, segment_ids)
        return self._project_out(mixed)

    def init_cache(self, batch: int, max_length: int, dtype: jnp.dtype) -> GlobalCache:
        """An empty cache for rows of at most max_length tokens."""
        cfg, groups = self.cfg, self.cfg.num_latent_groups
        blocks = summary_slots(max_length, cfg)
        return GlobalCache(
            latent=jnp.zeros((batch, max_length, groups, cfg.group_kv_lora_rank), dtype),
            rope_key=jnp.zeros((batch, max_length, cfg.qk_rope_head_dim), dtype),
            compressed_latent=jnp.zeros((batch, blocks, groups, cfg.group_kv_lora_rank), dtype),
            compressed_rope_key=jnp.zeros((batch, blocks, cfg.qk_rope_head_dim), dtype),
            block_indices=jnp.full((batch, groups, cfg.num_selected_blocks), -1, jnp.int32),
        )

    def prefill(
        self, x: jax.Array, positions: jax.Array, chunk: Chunk, cache: GlobalCache
    ) -> tuple[jax.Array, GlobalCache]:
        """Maps a chunk of tokens, [B, T, D] at positions [B, T], and appends it to the cache."""
        query, size = self._absorb(*self.query(x, positions)), x.shape[1]
        new = zip(self._compress(x, positions), LATENTS, strict=True)
        latent, rope_key = (
            fill(old, in_row_order(array, *axes), chunk)
            for old, (array, axes) in zip(cache[:2], new, strict=True)
        )
        compressed_latent, compressed_rope_key = (
            fill_blocks(old, self._pool(_slice(row, chunk, size)), chunk, size, self.cfg)
            for old, row in zip(cache[2:4], (latent, rope_key), strict=True)
        )
        rows = latent, rope_key, compressed_latent, compressed_rope_key
        attend = sharded(
            self._attend_cached,
            (QUERY, QUERY, *LATENT_ROWS * 2, SEGMENT_IDS, LIST_IN_FORCE, CHUNK),
            (QUERY, LISTS),
        )
        segment_ids = chunk.segment_ids(latent.shape[1])
        in_force = cache.block_indices[:, None]
        summaries = (summaries_of(array, latent.shape[1], self.cfg) for array in rows[2:])
        rows_read = (latent, rope_key, *summaries)
        mixed, lists = attend(query, self._gate(x), *rows_read, segment_ids, in_force, chunk)
        lists = in_row_order(self._without_copies(lists), "batch", "sequence", "groups", "block")
        in_force = last_selection(lists, cache.block_indices, chunk, size, self.cfg)
        return self._project_out(mixed), GlobalCache(*rows, in_force)

    def decode(
        self, x: jax.Array, position: jax.Array, cache: GlobalCache
    ) -> tuple[jax.Array, GlobalCache]:
        """Maps one token a row, [B, D] at position [B], to [B, D], and appends it to the cache."""
        rows, padded, x = position.size, pad_rows(position, x.shape[0])[:, None], x[:, None]
        query, latent, rope_key, gate = (a[:rows] for a in self._project(x, padded))
        query = query[:, 0]
        cache = cache._replace(
            latent=write(cache.latent, position, latent[:, 0]),
            rope_key=write(cache.rope_key, position, rope_key[:, 0]),
        )
        cache = self._complete_block(cache, position)
        compressed_keys = Keys(cache.compressed_latent, rope_key=cache.compressed_rope_key)
        compressed, lse = attend_cache(
            query, compressed_keys, complete_blocks(position, self.cfg), self.scale,
            self.cfg.implementation,
        )  # fmt: skip
        # Its splits are merged while blocks are chosen, and not with those of the other branch.
        compressed = jax.lax.optimization_barrier(compressed)
        block_indices = update_selection(
            query, compressed_keys, lse, cache.block_indices, position, self.cfg, self.scale
        )
        keys = Keys(cache.latent, rope_key=cache.rope_key)
        selected = attend_blocks(query, keys, block_indices, position + 1, self.cfg, self.scale)
        mixed = pad_rows(_mix(gate[:, 0], compressed, selected), x.shape[0])
        return self._project_out(mixed[:, None])[:, 0], cache._replace(block_indices=block_indices)

    def _gate(self, x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.gates("BTD,DNE->BTNE", x))

    def _project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        """Absorbed queries, latents, rotated keys and gates of tokens [B, T, D]."""
        if self.joined is None:
            absorbed = self._absorb(*self.query(x, positions))
            return absorbed, *self._compress(x, positions), self._gate(x)
        query, latent, rope_key, gate = self.joined(x)
        absorbed = self._absorb(*self.query.finish(query, positions))
        placed = place(self.norm, latent, rope_key, positions, self.cfg)
        return absorbed, *placed, jax.nn.sigmoid(gate)

    def _compress(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        rope_key = self.rope_key("BTD,DH->BTH", x)
        return place(self.norm, self.down("BTD,DKR->BTKR", x), rope_key, positions, self.cfg)

    def _pool(self, x: jax.Array) -> jax.Array:
        return pool_blocks(x, self.cfg.compression_block_size, self.cfg.compression_stride)

    def _absorb(self, nope: jax.Array, rope: jax.Array) -> jax.Array:
        return jnp.concatenate([self.key_up("BTNH,RNH->BTNR", nope), rope], axis=-1)

    def _project_out(self, mixed: jax.Array) -> jax.Array:
        return self.output("BTNH,NHD->BTD", self.value_up("BTNR,RNH->BTNH", mixed))

    def _attend(self, *arrays: jax.Array) -> jax.Array:
        """Gated sum of both branches over latents [B, T, N, R].

        Args:
            *arrays: query, gates, latent, rope_key, compressed_latent, compressed_rope_key,
                segment_ids.
        """
        attend = sharded(self._attend_part, (QUERY, QUERY, *LATENTS * 2, SEGMENT_IDS), QUERY)
        return attend(*arrays)

    def _without_copies(self, lists: jax.Array) -> jax.Array:
        # More tensor shards than groups make the list of a group several times.
        return lists[:, :, :: lists.shape[2] // self.cfg.num_latent_groups]

    def _attend_part(
        self,
        query: jax.Array,
        gates: jax.Array,
        latent: jax.Array,
        rope_key: jax.Array,
        compressed_latent: jax.Array,
        compressed_rope_key: jax.Array,
        segment_ids: jax.Array,
    ) -> jax.Array:
        """One device's heads and part of each row, against the latents of whole rows."""
        rows = *gather_rows(latent, rope_key), *gather_rows(compressed_latent, compressed_rope_key)
        keys = _own_keys(*rows)
        return map_queries(
            lambda query, gates, offset: self._attend_rows(
                query, gates, keys, self._row(segment_ids, offset)
            )[0],
            query,
            gates,
        )

    def _attend_cached(
        self,
        query: jax.Array,
        gates: jax.Array,
        latent: jax.Array,
        rope_key: jax.Array,
        compressed_latent: jax.Array,
        compressed_rope_key: jax.Array,
        segment_ids: jax.Array,
        in_force: jax.Array,
        chunk: Chunk,
    ) -> tuple[jax.Array, jax.Array]:
        """One device's heads and part of a chunk, against a cache; also the lists [B, M, K, L]."""
        keys = _own_keys(latent, rope_key, compressed_latent, compressed_rope_key)
        in_force = own_groups(in_force)[:, 0]

        def attend(query: jax.Array, gates: jax.Array, offset: jax.Array) -> tuple[jax.Array, ...]:
            def keep(lists: jax.Array) -> jax.Array:
                every = self.cfg.queries_per_selection
                return keep_selection(lists, in_force, chunk, offset, every)

            return self._attend_rows(query, gates, keys, self._row(segment_ids, offset), keep)

        return map_queries(attend, query, gates, offset=chunk.offset)

    def _row(self, segment_ids: jax.Array, query_offset: jax.Array | None) -> dict[str, Any]:
        """What the three operations take alike."""
        return {
            "segment_ids": segment_ids,
            "query_offset": query_offset,
            "scale": self.scale,
            "implementation": self.cfg.implementation,
        }

    def _attend_rows(
        self,
        query: jax.Array,
        gates: jax.Array,
        keys: tuple[jax.Array, jax.Array],
        row: dict[str, Any],
        keep: Callable[[jax.Array], jax.Array] = lambda lists: lists,
    ) -> tuple[jax.Array, jax.Array]:
        """Queries against whole rows of tokens and blocks; `keep` may alter the lists."""
        cfg, (key, compressed_key) = self.cfg, keys
        compressed, lse = compressed_attention(
            query, compressed_key, None, value_dim=cfg.group_kv_lora_rank,
            block_size=cfg.compression_block_size, stride=cfg.compression_stride, **row,
        )  # fmt: skip
        block_indices = keep(self._select(query, compressed_key, lse, row))
        selected, _ = selected_attention(
            query, key, None, block_indices, value_dim=cfg.group_kv_lora_rank,
            block_size=cfg.selection_block_size,
            queries_per_selection=cfg.queries_per_selection, **row,
        )  # fmt: skip
        return _mix(gates, compressed, selected), block_indices

    def _select(
        self, query: jax.Array, compressed_key: jax.Array, lse: jax.Array, row: dict[str, Any]
    ) -> jax.Array:
        """The lists [B, M, K, L], by all heads of a group even if this device has some of them."""
        cfg, every = self.cfg, self.cfg.queries_per_selection
        if shards_per_group(cfg.num_latent_groups) > 1:
            # Only the first query of each list counts, so only that one travels.
            query, lse = (
                jnp.repeat(gather_group(x[:, ::every], cfg.num_latent_groups), every, axis=1)
                for x in jax.lax.stop_gradient((query, lse))
            )
        return select_blocks(
            query, compressed_key, lse,
            num_selected_blocks=cfg.num_selected_blocks,
            block_size=cfg.selection_block_size,
            compression_block_size=cfg.compression_block_size,
            compression_stride=cfg.compression_stride,
            queries_per_selection=every, **row,
        )  # fmt: skip

    def _complete_block(self, cache: GlobalCache, position: jax.Array) -> GlobalCache:
        """Appends the block means where a block ends at `position` [B]."""
        block, completes = completed_block(position, self.cfg)
        size = self.cfg.compression_block_size
        start = jnp.maximum(position + 1 - size, 0)
        rows = jnp.arange(position.shape[0])[:, None]
        tokens = start[:, None] + jnp.arange(size)
        latent = block_mean(cache.latent[rows, tokens], axis=1)
        rope_key = block_mean(cache.rope_key[rows, tokens], axis=1)
        return cache._replace(
            compressed_latent=write_if(cache.compressed_latent, block, latent, completes),
            compressed_rope_key=write_if(cache.compressed_rope_key, block, rope_key, completes),
        )


def _join(latent: jax.Array, rope_key: jax.Array) -> jax.Array:
    """Keys [..., K, R + HR]: latents followed by the rotated key, broadcast over the groups."""
    rope_key = jnp.broadcast_to(rope_key, (*latent.shape[:-1], rope_key.shape[-1]))
    return jnp.concatenate([latent, rope_key], axis=-1)


def _own_keys(
    latent: jax.Array,
    rope_key: jax.Array,
    compressed_latent: jax.Array,
    compressed_rope_key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Keys of tokens and of blocks [B, S, K, R + HR], of the groups of this tensor shard."""
    return (
        _join(own_groups(latent), rope_key[:, :, None]),
        _join(own_groups(compressed_latent), compressed_rope_key[:, :, None]),
    )


def _slice(row: jax.Array, chunk: Chunk, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(row, chunk.offset, size, axis=1)


def _mix(gates: jax.Array, compressed: jax.Array, selected: jax.Array) -> jax.Array:
    """Gated sum [..., N, R] of the two branches, gates [..., N, 2]."""
    return gates[..., :1] * compressed + gates[..., 1:] * selected
