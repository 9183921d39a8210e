"""Native sparse attention (arXiv 2502.11089): kind `nsa`.

    o_n = sum over branches c of g^c_n Attention(q_n, K~^c, V~^c),   g = sigmoid(W_g x)

Branches: `compression` (a learned or mean summary of every block), `selection` (the tokens of the
blocks that compression weighs most, summed over the heads of a key/value head) and `window`. Each
branch has its own keys and values unless `nsa_share_kv`. A learned summary is an MLP over a block's
unrotated keys plus a code of the place inside the block, rotated to the position where the block
starts; means are of rotated keys. Any subset of the branches makes the ablations.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.context_parallel import (
    KEY,
    QUERY,
    SEGMENT_IDS,
    gather_rows,
    in_row_order,
    map_chunks,
    map_queries,
    map_windows,
)
from asa_jax.model.block_cache import (
    block_mean,
    completed_block,
    cut_blocks,
    last_selection,
    selected_tokens,
    update_selection,
    visible_blocks,
)
from asa_jax.model.cached_attention import (
    attend_cache,
    fill,
    fill_ring,
    ring_positions,
    write,
    write_if,
)
from asa_jax.model.layers import Projection, normal_param, residual_stddev
from asa_jax.model.rope import rotate
from asa_jax.sharding import constrain, sharded
from pallas_kernels.blocks import number_of_blocks
from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.selected_attention import selected_attention
from pallas_kernels.sliding_window_attention import sliding_window_attention

LISTS = ("batch", "sequence", "kv_heads", "block")


class KeyValue(NamedTuple):
    """Keys and values [B, S, K, H]."""

    key: jax.Array
    value: jax.Array


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


class BlockSummary(nnx.Module):
    """Summary of a block: silu((x + code) W_1) W_2 over its l tokens at once."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        size, block, std = cfg.head_dim, cfg.compression_block_size, cfg.init_stddev
        self.code = normal_param((block, size), ("block", "head_dim"), std, rngs)
        into = (block, size, size)
        axes = ("block", "head_dim", "latent")
        self.into = Projection(into, axes, (block * size) ** -0.5, rngs=rngs)
        self.out = Projection(into[1:], ("latent", "head_dim"), size**-0.5, rngs=rngs)

    def __call__(self, blocks: jax.Array) -> jax.Array:
        """Maps blocks [B, C, l, K, H] to [B, C, K, H]."""
        code = self.code[...].astype(blocks.dtype)[:, None]
        hidden = jax.nn.silu(self.into("BCLKH,LHF->BCKF", blocks + code))
        return self.out("BCKF,FH->BCKH", hidden)


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
        output, _ = self._attend(x, *self._project(x, positions), positions, segment_ids)
        return output

    def init_cache(self, batch: int, max_length: int, dtype: jnp.dtype) -> SparseCache:
        """An empty cache for rows of at most max_length tokens."""
        cfg = self.cfg

        def empty(slots: int) -> KeyValue:
            shape = (batch, slots, cfg.num_kv_heads, cfg.head_dim)
            return KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

        compression, selection, window = self._branches()
        blocks = number_of_blocks(max_length, cfg.compression_block_size, cfg.compression_stride)
        own_window = window and not (selection and cfg.nsa_share_kv)
        lists = (batch, cfg.num_kv_heads, cfg.num_selected_blocks)
        return SparseCache(
            tokens=empty(max_length) if selection else None,
            window=empty(min(cfg.window_size, max_length)) if own_window else None,
            recent=empty(cfg.compression_block_size) if compression else None,
            compressed=empty(max(1, blocks)) if compression else None,
            block_indices=jnp.full(lists, -1, jnp.int32) if selection else None,
        )

    def prefill(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        lengths: jax.Array,
        cache: SparseCache,
    ) -> tuple[jax.Array, SparseCache]:
        """As `__call__` for prompts of `lengths` [B] tokens, and fills the cache with them."""
        query, pairs = self._project(x, positions)
        output, block_indices = self._attend(x, query, pairs, positions, segment_ids)

        def fill_pair(part: KeyValue | None, branch: str, ring: bool) -> KeyValue | None:
            if part is None:
                return None
            put = (lambda old, new: fill_ring(old, new, lengths)) if ring else fill
            return KeyValue(*map(put, part, (in_row_order(a, *KEY) for a in pairs[branch])))

        compressed = cache.compressed
        if compressed is not None:
            summaries = self._compress(pairs, positions)
            rows = (in_row_order(a, *KEY, skip=self.incomplete_blocks) for a in summaries)
            compressed = KeyValue(*map(fill, compressed, rows))
        if block_indices is not None:
            lists = in_row_order(block_indices, *LISTS)
            block_indices = last_selection(lists, lengths, self.cfg)
        return output, SparseCache(
            tokens=fill_pair(cache.tokens, "selection", ring=False),
            window=fill_pair(cache.window, "window", ring=True),
            recent=fill_pair(cache.recent, "compression", ring=True),
            compressed=compressed,
            block_indices=block_indices,
        )

    def decode(
        self, x: jax.Array, position: jax.Array, cache: SparseCache
    ) -> tuple[jax.Array, SparseCache]:
        """Maps one token a row, [B, D] at position [B], to [B, D], and appends it to the cache."""
        x = x[:, None]
        query, pairs = self._project(x, position[:, None])
        cache = self._append(pairs, position, cache)
        outputs: dict[str, jax.Array] = {}
        if cache.compressed is not None:
            visible = visible_blocks(position, cache.compressed.key.shape[1], self.cfg)
            outputs["compression"], probabilities = attend_cache(
                query[:, 0], *cache.compressed, visible, self.scale
            )
        if cache.tokens is not None and cache.block_indices is not None:
            block_indices = update_selection(probabilities, position, cache.block_indices, self.cfg)
            tokens, visible = selected_tokens(
                block_indices, position, self.cfg.selection_block_size
            )
            # The newest block may reach behind the cache, where nothing is visible.
            key, value = (
                jnp.take_along_axis(a, tokens[..., None], axis=1, mode="clip") for a in cache.tokens
            )
            outputs["selection"], _ = attend_cache(query[:, 0], key, value, visible, self.scale)
            cache = cache._replace(block_indices=block_indices)
        if "window" in self.cfg.nsa_branches:
            outputs["window"] = self._attend_window(query[:, 0], cache, position)
        output = self._combine(x, {name: o[:, None] for name, o in outputs.items()})
        return output[:, 0], cache

    def _branches(self) -> tuple[bool, bool, bool]:
        branches = self.cfg.nsa_branches
        return "compression" in branches, "selection" in branches, "window" in branches

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
    ) -> tuple[jax.Array, jax.Array | None]:
        """The layer's output [B, T, D] and the lists [B, M, K, L] if there is selection."""
        cfg = self.cfg
        if "compression" in pairs:
            pairs = pairs | {"compression": self._compress(pairs, positions)}
        outputs = dict.fromkeys(cfg.nsa_branches, QUERY)
        attend = sharded(
            self._attend_part,
            (QUERY, dict.fromkeys(pairs, KEY), SEGMENT_IDS),
            (outputs, LISTS if "selection" in pairs else None),
        )
        outputs, block_indices = attend(query, pairs, segment_ids)
        return self._combine(x, outputs), block_indices

    def _attend_part(
        self, query: jax.Array, pairs: dict[str, KeyValue], segment_ids: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array | None]:
        """Each branch's output for one device's heads and part of each row, and the lists.

        The pair of `compression` are summaries.
        """
        outputs, block_indices = {}, None
        if "compression" in pairs:
            compressed = KeyValue(*gather_rows(*pairs["compression"], skip=self.incomplete_blocks))
            tokens = KeyValue(*gather_rows(*pairs["selection"])) if "selection" in pairs else None
            row = {"segment_ids": segment_ids, "implementation": self.cfg.implementation}
            outputs, block_indices = map_queries(
                lambda query, offset: self._attend_blocks(
                    query, compressed, tokens, {**row, "query_offset": offset}
                ),
                query,
            )
        if "window" in pairs:
            outputs["window"] = self._attend_recent(query, pairs["window"], segment_ids)
        return outputs, block_indices

    def _attend_blocks(
        self,
        query: jax.Array,
        compressed: KeyValue,
        tokens: KeyValue | None,
        row: dict[str, Any],
    ) -> tuple[dict[str, jax.Array], jax.Array | None]:
        """Queries against blocks of whole rows; `row` holds what the operations take alike."""
        cfg = self.cfg
        output, lse = compressed_attention(
            query, *compressed, block_size=cfg.compression_block_size,
            stride=cfg.compression_stride, **row,
        )  # fmt: skip
        if tokens is None:
            return {"compression": output}, None
        block_indices = select_blocks(
            query, compressed.key, lse,
            num_selected_blocks=cfg.num_selected_blocks,
            block_size=cfg.selection_block_size,
            compression_block_size=cfg.compression_block_size,
            compression_stride=cfg.compression_stride,
            queries_per_selection=cfg.queries_per_selection, **row,
        )  # fmt: skip
        selected, _ = selected_attention(
            query, *tokens, block_indices, block_size=cfg.selection_block_size,
            queries_per_selection=cfg.queries_per_selection, **row,
        )  # fmt: skip
        return {"compression": output, "selection": selected}, block_indices

    def _attend_recent(self, query: jax.Array, pair: KeyValue, segment_ids: jax.Array) -> jax.Array:
        def attend(
            query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
        ) -> jax.Array:
            output, _ = sliding_window_attention(
                query, key, value, window_size=self.cfg.window_size, segment_ids=segment_ids,
                implementation=self.cfg.implementation,
            )  # fmt: skip
            return output

        return map_windows(attend, self.cfg.window_size - 1, (query,), pair, segment_ids)

    def _combine(self, x: jax.Array, outputs: dict[str, jax.Array]) -> jax.Array:
        gates = jax.nn.sigmoid(self.gates("BTD,DNE->BTNE", x))
        stacked = jnp.stack([outputs[branch] for branch in self.cfg.nsa_branches], axis=-2)
        mixed = jnp.sum(gates[..., None] * stacked, axis=-2)
        return self.output("BTNH,NHD->BTD", mixed)

    def _append(
        self, pairs: dict[str, KeyValue], position: jax.Array, cache: SparseCache
    ) -> SparseCache:
        """Writes the new token to every part, and the summary of a block that it completes."""

        def put(part: KeyValue | None, branch: str) -> KeyValue | None:
            if part is None:
                return None
            slot = position % part.key.shape[1]
            return KeyValue(
                *(write(old, slot, new[:, 0]) for old, new in zip(part, pairs[branch], strict=True))
            )

        cache = cache._replace(
            tokens=put(cache.tokens, "selection"),
            window=put(cache.window, "window"),
            recent=put(cache.recent, "compression"),
        )
        if cache.recent is None or cache.compressed is None:
            return cache
        block, completes = completed_block(position, self.cfg)
        size = self.cfg.compression_block_size
        start = position + 1 - size
        order = (start[:, None] + jnp.arange(size)) % size
        key, value = (
            jnp.take_along_axis(a, order[..., None, None], axis=1)[:, None] for a in cache.recent
        )
        summary = self._summarise(key, value, start[:, None])
        compressed = (
            write_if(old, block, new[:, 0], completes)
            for old, new in zip(cache.compressed, summary, strict=True)
        )
        return cache._replace(compressed=KeyValue(*compressed))

    def _attend_window(
        self, query: jax.Array, cache: SparseCache, position: jax.Array
    ) -> jax.Array:
        if cache.window is not None:
            visible = ring_positions(position, cache.window.key.shape[1]) >= 0
            return attend_cache(query, *cache.window, visible, self.scale)[0]
        assert cache.tokens is not None  # the branches share their tokens
        tokens = position[:, None] - jnp.arange(self.cfg.window_size)
        rows = jnp.arange(position.shape[0])[:, None]
        key, value = (a[rows, jnp.maximum(tokens, 0)] for a in cache.tokens)
        return attend_cache(query, key, value, tokens >= 0, self.scale)[0]
