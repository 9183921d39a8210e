"""Native sparse attention (arXiv 2502.11089): kind `nsa`.

    o_n = sum over branches c of g^c_n Attention(q_n, K~^c, V~^c),   g = sigmoid(W_g x)

Branches: `compression` (a learned or mean summary of every block), `selection` (the tokens of the
blocks that compression weighs most, summed over the heads of a key/value head) and `window`. Each
branch has its own keys and values unless `nsa_share_kv`. A learned summary is an MLP over a block's
unrotated keys plus a code of the place inside the block, rotated to the position where the block
starts; means are of rotated keys. Any subset of the branches makes the ablations.
"""

from collections.abc import Callable
from typing import Any

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
    map_chunks,
    map_queries,
    map_windows,
)
from asa_jax.model.block_cache import (
    block_mean,
    complete_blocks,
    cut_blocks,
    keep_selection,
    last_selection,
    summaries_of,
    update_selection,
)
from asa_jax.model.block_summary import BlockSummary
from asa_jax.model.cached_attention import (
    CHUNK,
    Chunk,
    Keys,
    attend_blocks,
    attend_cache,
    pad_rows,
)
from asa_jax.model.layers import Projection, residual_stddev
from asa_jax.model.rope import rotate
from asa_jax.model.sparse_cache import (
    KeyValue,
    SparseCache,
    append_chunk,
    append_summaries,
    append_summary,
    append_token,
    empty_cache,
    known_tokens,
    window_keys,
)
from asa_jax.sharding import constrain, sharded
from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.selected_attention import selected_attention
from pallas_kernels.sliding_window_attention import sliding_window_attention

LISTS = ("batch", "sequence", "kv_heads", "block")
LIST_IN_FORCE = ("batch", "kv_heads", "block")


class NativeSparseAttention(nnx.Module):
    """NSA; see the module's equations."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        self.learned = cfg.nsa_compression == "mlp" and "compression" in cfg.nsa_branches
        size, std, branches = cfg.hidden_size, cfg.init_stddev, len(cfg.nsa_branches)
        into = (size, cfg.num_heads, cfg.head_dim)
        copies = 1 if cfg.nsa_share_kv else branches
        kv = (2 * copies, size, cfg.num_kv_heads, cfg.head_dim)
        self.query = Projection(into, ("embed", "heads", "head_dim"), std, rngs=rngs)
        self.key_value = Projection(kv, ("pair", "embed", "kv_heads", "head_dim"), std, rngs=rngs)
        self.gates = Projection(
            (size, cfg.num_heads, branches), ("embed", "heads", "gates"), std, rngs=rngs
        )
        self.output = Projection(
            (*into[1:], size), ("heads", "head_dim", "embed"), residual_stddev(cfg), rngs=rngs
        )
        if self.learned:
            self.key_summary = BlockSummary(cfg, rngs=rngs)
            self.value_summary = BlockSummary(cfg, rngs=rngs)
        self.scale = cfg.head_dim**-0.5
        # Where a row is shared, a summary stands where its block ends, and the first blocks of
        # these begin before the row.
        self.incomplete_blocks = cfg.compression_block_size // cfg.compression_stride - 1

    def __call__(self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; positions and segment_ids int [B, T]."""
        return self._attend(x, *self._project(x, positions), positions, segment_ids)

    def init_cache(self, batch: int, max_length: int, dtype: jnp.dtype) -> SparseCache:
        """An empty cache for rows of at most max_length tokens."""
        return empty_cache(self.cfg, batch, max_length, dtype)

    def prefill(
        self, x: jax.Array, positions: jax.Array, chunk: Chunk, cache: SparseCache
    ) -> tuple[jax.Array, SparseCache]:
        """Maps a chunk of tokens, [B, T, D] at positions [B, T], and appends it to the cache."""
        query, placed = self._project(x, positions)
        pairs = {
            branch: KeyValue(*(in_row_order(array, *KEY) for array in pair))
            for branch, pair in placed.items()
        }
        in_force, size = cache.block_indices, x.shape[1]
        cache, window_row, recent_row = append_chunk(cache, pairs, chunk, self.cfg)
        if recent_row is not None:
            cache = append_summaries(cache, recent_row, chunk, size, self._summarise, self.cfg)
        summaries = cache.compressed
        if summaries is not None and cache.tokens is not None:
            length = cache.tokens.key.shape[1]
            summaries = KeyValue(*(summaries_of(a, length, self.cfg) for a in summaries))
        kept = {"compression": summaries, "selection": cache.tokens, "window": window_row}
        rows = {branch: row for branch, row in kept.items() if row is not None}
        segments = {b: known_tokens(b, row, chunk, size, self.cfg) for b, row in rows.items()}
        lists = None if in_force is None else LISTS
        attend = sharded(
            self._attend_cached,
            (
                QUERY, dict.fromkeys(rows, KEY_ROW), dict.fromkeys(rows, SEGMENT_IDS),
                lists and LIST_IN_FORCE, CHUNK,
            ),
            (dict.fromkeys(rows, QUERY), lists),
        )  # fmt: skip
        outputs, block_indices = attend(query, rows, segments, in_force, chunk)
        if block_indices is not None and in_force is not None:
            block_indices = in_row_order(block_indices, *LISTS)
            in_force = last_selection(block_indices, in_force, chunk, size, self.cfg)
        return self._combine(x, outputs), cache._replace(block_indices=in_force)

    def decode(
        self, x: jax.Array, position: jax.Array, cache: SparseCache
    ) -> tuple[jax.Array, SparseCache]:
        """Maps one token a row, [B, D] at position [B], to [B, D], and appends it to the cache."""
        rows, padded, x = position.size, pad_rows(position, x.shape[0])[:, None], x[:, None]
        query, pairs = jax.tree.map(lambda a: a[:rows], self._project(x, padded))
        cache = append_token(cache, pairs, position)
        cache = append_summary(cache, position, self._summarise, self.cfg)
        outputs: dict[str, jax.Array] = {}
        if cache.compressed is not None:
            compressed = Keys(*cache.compressed)
            outputs["compression"], lse = attend_cache(
                query[:, 0], compressed, complete_blocks(position, self.cfg), self.scale,
                self.cfg.implementation,
            )  # fmt: skip
        if cache.tokens is not None and cache.block_indices is not None:
            block_indices = update_selection(
                query[:, 0], compressed, lse, cache.block_indices, position, self.cfg, self.scale
            )
            outputs["selection"] = attend_blocks(
                query[:, 0], Keys(*cache.tokens), block_indices, position + 1, self.cfg, self.scale
            )
            cache = cache._replace(block_indices=block_indices)
        if "window" in self.cfg.nsa_branches:
            keys = window_keys(cache, position, self.cfg)
            lengths = jnp.minimum(position + 1, keys.key.shape[1])
            outputs["window"], _ = attend_cache(
                query[:, 0], keys, lengths, self.scale, self.cfg.implementation
            )
        padded_outputs = {n: pad_rows(o, x.shape[0])[:, None] for n, o in outputs.items()}
        output = self._combine(x, padded_outputs)
        return output[:, 0], cache

    def _project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, dict[str, KeyValue]]:
        """Rotated queries [B, T, N, H], and each branch's keys and values.

        Keys are rotated, save those that compression summarises with an MLP.
        """
        rope = self.cfg.rope_theta, self.cfg.rope_scaling
        query = constrain(self.query("BTD,DNH->BTNH", x), "batch", "sequence", "heads", "head_dim")
        projected = self.key_value("BTD,PDKH->PBTKH", x)
        pairs = {}
        for i, branch in enumerate(self.cfg.nsa_branches):
            first = 0 if self.cfg.nsa_share_kv else 2 * i
            key, value = projected[first], projected[first + 1]
            if not (branch == "compression" and self.learned):
                key = rotate(key, positions, *rope)
            pairs[branch] = KeyValue(key, value)
        return rotate(query, positions, *rope), pairs

    def _compress(self, pairs: dict[str, KeyValue], positions: jax.Array) -> KeyValue:
        cfg = self.cfg
        size, stride = cfg.compression_block_size, cfg.compression_stride

        def cut(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
            """Blocks [B, C, l, ...] of tokens [B, T, ...]."""
            blocks = sharded(
                lambda part: map_chunks(
                    lambda chunk: cut_blocks(chunk, size, stride), size - stride, (part,)
                ),
                (axes,),
                ("batch", "sequence", "block", *axes[2:]),
            )
            return blocks(x)

        key, value = (cut(a, KEY) for a in pairs["compression"])
        return self._summarise(key, value, cut(positions, ("batch", "sequence"))[:, :, 0])

    def _summarise(self, key: jax.Array, value: jax.Array, starts: jax.Array) -> KeyValue:
        """Summaries of blocks [B, C, l, K, H] that start at positions [B, C]."""
        if not self.learned:
            return KeyValue(block_mean(key, axis=2), block_mean(value, axis=2))
        rope = self.cfg.rope_theta, self.cfg.rope_scaling
        key = rotate(self.key_summary(key), starts, *rope)
        return KeyValue(key, self.value_summary(value))

    def _attend(
        self,
        x: jax.Array,
        query: jax.Array,
        pairs: dict[str, KeyValue],
        positions: jax.Array,
        segment_ids: jax.Array,
    ) -> jax.Array:
        """The layer's output [B, T, D]."""
        if "compression" in pairs:
            pairs = pairs | {"compression": self._compress(pairs, positions)}
        attend = sharded(
            self._attend_part,
            (QUERY, dict.fromkeys(pairs, KEY), SEGMENT_IDS),
            dict.fromkeys(self.cfg.nsa_branches, QUERY),
        )
        return self._combine(x, attend(query, pairs, segment_ids))

    def _attend_part(
        self, query: jax.Array, pairs: dict[str, KeyValue], segment_ids: jax.Array
    ) -> dict[str, jax.Array]:
        """Each branch's output for one device's heads and part of each row.

        The pair of `compression` are summaries.
        """
        outputs: dict[str, jax.Array] = {}
        if "compression" in pairs:
            compressed = KeyValue(*gather_rows(*pairs["compression"], skip=self.incomplete_blocks))
            tokens = KeyValue(*gather_rows(*pairs["selection"])) if "selection" in pairs else None
            outputs, _ = map_queries(
                lambda query, offset: self._attend_blocks(
                    query, compressed, tokens, self._row(segment_ids, offset)
                ),
                query,
            )
        if "window" in pairs:
            outputs["window"] = map_windows(
                self._attend_recent, self.cfg.window_size - 1, (query,), pairs["window"],
                segment_ids,
            )  # fmt: skip
        return outputs

    def _attend_cached(
        self,
        query: jax.Array,
        rows: dict[str, KeyValue],
        segment_ids: dict[str, jax.Array],
        in_force: jax.Array | None,
        chunk: Chunk,
    ) -> tuple[dict[str, jax.Array], jax.Array | None]:
        """Each branch's output for one device's heads and part of a chunk, and the lists."""

        def attend(
            query: jax.Array, offset: jax.Array
        ) -> tuple[dict[str, jax.Array], jax.Array | None]:
            def keep(lists: jax.Array) -> jax.Array:
                assert in_force is not None
                every = self.cfg.queries_per_selection
                return keep_selection(lists, in_force, chunk, offset, every)

            row = self._row(segment_ids.get("selection", segment_ids["compression"]), offset)
            return self._attend_blocks(query, rows["compression"], rows.get("selection"), row, keep)

        outputs: dict[str, jax.Array] = {}
        block_indices = None
        if "compression" in rows:
            outputs, block_indices = map_queries(attend, query, offset=chunk.offset)
        if "window" in rows:
            before = rows["window"].key.shape[1] - query.shape[1] * context_size()
            outputs["window"] = map_queries(
                lambda query, offset: self._attend_recent(
                    query, *rows["window"], segment_ids["window"], offset
                ),
                query,
                offset=before,
            )
        return outputs, block_indices

    def _row(self, segment_ids: jax.Array, query_offset: jax.Array | None) -> dict[str, Any]:
        """What the operations on blocks take alike."""
        return {
            "segment_ids": segment_ids,
            "query_offset": query_offset,
            "implementation": self.cfg.implementation,
        }

    def _attend_blocks(
        self,
        query: jax.Array,
        compressed: KeyValue,
        tokens: KeyValue | None,
        row: dict[str, Any],
        keep: Callable[[jax.Array], jax.Array] = lambda lists: lists,
    ) -> tuple[dict[str, jax.Array], jax.Array | None]:
        """Queries against blocks of whole rows; `keep` may alter the lists."""
        cfg = self.cfg
        output, lse = compressed_attention(
            query, *compressed, block_size=cfg.compression_block_size,
            stride=cfg.compression_stride, **row,
        )  # fmt: skip
        if tokens is None:
            return {"compression": output}, None
        block_indices = keep(select_blocks(
            query, compressed.key, lse,
            num_selected_blocks=cfg.num_selected_blocks,
            block_size=cfg.selection_block_size,
            compression_block_size=cfg.compression_block_size,
            compression_stride=cfg.compression_stride,
            queries_per_selection=cfg.queries_per_selection, **row,
        ))  # fmt: skip
        selected, _ = selected_attention(
            query, *tokens, block_indices, block_size=cfg.selection_block_size,
            queries_per_selection=cfg.queries_per_selection, **row,
        )  # fmt: skip
        return {"compression": output, "selection": selected}, block_indices

    def _attend_recent(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array,
        offset: jax.Array | int | None = None,
    ) -> jax.Array:
        output, _ = sliding_window_attention(
            query, key, value, window_size=self.cfg.window_size, segment_ids=segment_ids,
            query_offset=offset, implementation=self.cfg.implementation,
        )  # fmt: skip
        return output

    def _combine(self, x: jax.Array, outputs: dict[str, jax.Array]) -> jax.Array:
        gates = jax.nn.sigmoid(self.gates("BTD,DNE->BTNE", x))
        # Not stacked, which would store them all once more.
        gated = [gates[..., i, None] * outputs[n] for i, n in enumerate(self.cfg.nsa_branches)]
        return self.output("BTNH,NHD->BTD", sum(gated[1:], start=gated[0]))
