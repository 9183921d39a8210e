"""Decoding of one layer whose keys and values are on the host: index, selection and engine."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.engine import Engine
from asa_jax.async_tls.index import Index, append, init_index
from asa_jax.async_tls.selection import Lag, drifted, select_blocks, select_tokens
from asa_jax.async_tls.settings import NEVER, AsyncTLSConfig
from asa_jax.async_tls.token_attention import attend_rows


class OffloadedLayer:
    """State of one layer: its index on the device, its blocks in the engine, the lag.

    Attributes:
        reselected: key heads of all steps that the drift guard gave the blocks of their own query.
    """

    def __init__(
        self,
        cfg: AsyncTLSConfig,
        engine: Engine,
        channels: np.ndarray,
        *,
        lagged: bool,
        scale: float,
        value_dim: int | None = None,
    ) -> None:
        """Makes a layer of no tokens.

        Args:
            cfg: sizes.
            engine: for tokens of key and value side by side, or of the key alone with value_dim.
            channels: int32 [K, r], calibrated.
            lagged: whether blocks are those that the query of the step before chose.
            scale: factor on the scores.
            value_dim: for absorbed latents, whose values are the first features of their keys.
        """
        self.reselected = 0
        self._cfg, self._engine, self._lagged = cfg, engine, lagged
        self._channels = jnp.asarray(channels)
        self._attend = functools.partial(_attend_pool, scale=scale, value_dim=value_dim, cfg=cfg)

    def load(self, key: jax.Array, value: Any, lengths: np.ndarray) -> None:
        """Takes over a prompt; the first step behind it is synchronous in both forms.

        Args:
            key: [B, S, K, H], S a multiple of the block size and as long as rows may grow.
            value: [B, S, K, h], or None with value_dim.
            lengths: int [B], tokens of the prompts.
        """
        batch, length, num_kv_heads, head_dim = key.shape
        empty = init_index(
            batch, length, num_kv_heads, head_dim, num_channels=self._channels.shape[1],
            block_size=self._cfg.block_size, dtype=key.dtype,
        )  # fmt: skip
        self._index: Index = _append(empty, key, self._channels, jnp.asarray(lengths, jnp.int32))
        self._engine.load(np.asarray(_tokens(key, value)), lengths)
        self._lag: Lag | None = None

    def step(self, query: jax.Array, key: jax.Array, value: Any) -> jax.Array:
        """Appends a token to every row and attends.

        Args:
            query: [B, N, H].
            key: [B, K, H].
            value: [B, K, h], or None with value_dim.

        Returns:
            [B, N, h].

        Raises:
            TransferError: blocks did not arrive. The token may be appended by then, so a step
                cannot be repeated; the row is to be loaded anew.
        """
        self._engine.append(_tokens(key, value))
        self._index = _append(self._index, key[:, None], self._channels)
        self._engine.commit()
        blocks = self._blocks_now(query)
        slots, pool = jnp.asarray(self._engine.slots), self._engine.pool
        if self._lagged:
            following = _select(query, self._index, self._index.lengths + 1, self._cfg)
            self._lag = Lag(following, query)
            # Asked for before attention is dispatched: a copy behind it would wait for it.
            self._engine.prefetch(np.asarray(following))
        return self._attend(query, self._index, self._channels, blocks, slots, pool)

    def _blocks_now(self, query: jax.Array) -> jax.Array:
        """The blocks [B, K, L] for this query, those on the device that had to be fetched."""
        if not self._lagged or self._lag is None:
            blocks = _select(query, self._index, self._index.lengths, self._cfg)
            self._engine.fetch(np.asarray(blocks))
            return blocks
        if self._cfg.drift_cosine > NEVER:
            heads = self._channels.shape[0]
            turned = drifted(query, self._lag.query, heads, self._cfg.drift_cosine)
            if turned.any():
                self.reselected += int(turned.sum())
                fresh = _select(query, self._index, self._index.lengths, self._cfg)
                blocks = jnp.where(turned[..., None], fresh, self._lag.blocks)
                self._engine.fetch(np.asarray(blocks))
                return blocks
        return self._lag.blocks


_append = jax.jit(append)
_select = jax.jit(select_blocks, static_argnames="cfg")


def _tokens(key: Any, value: Any) -> Any:
    return key if value is None else jnp.concatenate([key, value], axis=-1)


@functools.partial(jax.jit, static_argnames=("scale", "value_dim", "cfg"))
def _attend_pool(
    query: jax.Array,
    index: Index,
    channels: jax.Array,
    blocks: jax.Array,
    slots: jax.Array,
    pool: jax.Array,
    *,
    scale: float,
    value_dim: int | None,
    cfg: AsyncTLSConfig,
) -> jax.Array:
    """Attends to the selected tokens of those blocks [B, K, L] that have slots [B, K, C]."""
    there = jnp.take_along_axis(slots, blocks, axis=2) >= 0
    blocks = jnp.where(there & (blocks >= 0), blocks, -1)
    positions = select_tokens(query, index, channels, blocks, scale, cfg)
    slot = jnp.take_along_axis(slots, positions // cfg.block_size, axis=2)
    place = slot * cfg.block_size + positions % cfg.block_size
    flat = pool.reshape(*slots.shape[:2], -1, pool.shape[-1])
    tokens = jnp.take_along_axis(flat, place[..., None], axis=2)
    head_dim = query.shape[2]
    value = tokens[..., head_dim:] if value_dim is None else tokens[..., :value_dim]
    return attend_rows(query, tokens[..., :head_dim], value, positions >= 0, scale)
