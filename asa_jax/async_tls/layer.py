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
from pallas_kernels.async_tls_attention import async_tls_attention
from pallas_kernels.dispatch import Implementation

PART_TOKENS = 8192  # of a prompt, that are indexed at a time


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
        implementation: Implementation | None = None,
    ) -> None:
        """Makes a layer of no tokens.

        Args:
            cfg: sizes.
            engine: for tokens of key and value side by side, or of the key alone with value_dim.
            channels: int32 [K, r], calibrated.
            lagged: whether blocks are those that the query of the step before chose.
            scale: factor on the scores.
            value_dim: for absorbed latents, whose values are the first features of their keys.
            implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.
        """
        self.reselected = 0
        self._cfg, self._engine, self._lagged = cfg, engine, lagged
        self._channels = jnp.asarray(channels)
        sizes: dict[str, Any] = {"cfg": cfg, "implementation": implementation}
        self._advance = functools.partial(_advance, ahead=int(lagged), **sizes)
        self._select = functools.partial(_select, **sizes)
        self._attend = functools.partial(attend_places, scale=scale, value_dim=value_dim, **sizes)

    @property
    def device_bytes(self) -> int:
        """Bytes of index and pool."""
        return sum(array.nbytes for array in jax.tree.leaves((self._index, self._engine.pool)))

    def load(self, key: jax.Array, value: Any, lengths: np.ndarray) -> None:
        """Takes over a prompt; the first step behind it is synchronous in both forms.

        Args:
            key: [B, S, K, H], S a multiple of the block size and as long as rows may grow.
            value: [B, S, K, h], or None with value_dim.
            lengths: int [B], tokens of the prompts.
        """
        self._index = index_prompt(key, self._channels, lengths, self._cfg.block_size)
        self._engine.load(np.asarray(by_head(key, value)), lengths)
        self._lag: Lag | None = None
        # The blocks of the lag on the host, once they were asked for.
        self._listed: np.ndarray | None = None

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
        self.request()
        self._index, tokens, chosen = self._advance(query, key, value, self._index, self._channels)
        chosen.copy_to_host_async()
        self._engine.append(tokens)
        self._engine.commit()
        blocks, listed = self._blocks_now(query, chosen)
        places = self._engine.slots_of(listed)
        if self._lagged:
            self._lag, self._listed = Lag(chosen, query), None
        pool = self._engine.pool
        return self._attend(query, self._index, self._channels, blocks, places, pool)

    def request(self) -> None:
        """Asks for the blocks of the next step, unless it did; waits till they are chosen.

        The sooner after `step`, the longer blocks have to come. `step` itself does not wait, so
        that the device has work in the meantime.
        """
        if self._lag is not None and self._listed is None:
            self._listed = np.asarray(self._lag.blocks)
            self._engine.prefetch(self._travelling(self._listed, self._engine.lengths + 1))

    def _blocks_now(self, query: jax.Array, chosen: jax.Array) -> tuple[jax.Array, np.ndarray]:
        """The blocks [B, K, L] for this query, those on the device that had to be fetched."""
        if not self._lagged:
            return self._fetched(chosen)
        if self._lag is None:
            return self._fetched(self._select(query, self._index))
        if self._cfg.drift_cosine > NEVER:
            heads = self._channels.shape[0]
            turned = drifted(query, self._lag.query, heads, self._cfg.drift_cosine)
            if turned.any():
                self.reselected += int(turned.sum())
                fresh = self._select(query, self._index)
                return self._fetched(jnp.where(turned[..., None], fresh, self._lag.blocks))
        assert self._listed is not None  # by `request`
        return self._lag.blocks, self._listed

    def _fetched(self, blocks: jax.Array) -> tuple[jax.Array, np.ndarray]:
        listed = np.asarray(blocks)
        self._engine.fetch(self._travelling(listed, self._engine.lengths))
        return blocks, listed

    def _travelling(self, blocks: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """A list [B, K, L] with -1 for what is on the device anyway at so many tokens [B]."""
        tails = ((lengths - 1) // self._cfg.block_size)[:, None, None]
        return np.where((blocks > 0) & (blocks < tails - 1), blocks, -1)


_append = jax.jit(append, donate_argnums=0)


def index_prompt(
    key: jax.Array, channels: jax.Array, lengths: np.ndarray, block_size: int
) -> Index:
    """The index of prompts, made part by part: what is made on the way is several times a part.

    Args:
        key: [B, S, K, H], S a multiple of the block size.
        channels: int32 [K, r].
        lengths: int [B], tokens of the prompts.
        block_size: tokens of a block.
    """
    index = init_index(
        *key.shape, num_channels=channels.shape[1], block_size=block_size, dtype=key.dtype
    )
    for begin in range(0, key.shape[1], PART_TOKENS):
        part = key[:, begin : begin + PART_TOKENS]
        counts = np.clip(lengths - begin, 0, part.shape[1]).astype(np.int32)
        index = _append(index, part, channels, counts)
    return index


@functools.partial(jax.jit, static_argnames=("cfg", "implementation"))
def _select(
    query: jax.Array, index: Index, *, cfg: AsyncTLSConfig, implementation: Implementation | None
) -> jax.Array:
    return select_blocks(query, index, index.lengths, cfg, implementation)


@functools.partial(
    jax.jit, static_argnames=("ahead", "cfg", "implementation"), donate_argnames="index"
)
def _advance(
    query: jax.Array,
    key: jax.Array,
    value: Any,
    index: Index,
    channels: jax.Array,
    *,
    ahead: int,
    cfg: AsyncTLSConfig,
    implementation: Implementation | None,
) -> tuple[Index, jax.Array, jax.Array]:
    """The index with one token more, the token by row of the pool, and the blocks of level 1.

    `ahead`: at how many tokens more the blocks are to be read.
    """
    index = append(index, key[:, None], channels)
    tokens = joined(key, value)
    blocks = select_blocks(query, index, index.lengths + ahead, cfg, implementation)
    return index, tokens.reshape(-1, tokens.shape[-1]), blocks


@jax.jit
def by_head(key: jax.Array, value: Any) -> jax.Array:
    """Tokens of a prompt, head by head: [B, K, S, width]."""
    return joined(key, value).swapaxes(1, 2)


def joined(key: Any, value: Any) -> Any:
    """Key and value of tokens side by side, or the key alone."""
    return key if value is None else jnp.concatenate([key, value], axis=-1)


@functools.partial(jax.jit, static_argnames=("scale", "value_dim", "cfg", "implementation"))
def attend_places(
    query: jax.Array,
    index: Index,
    channels: jax.Array,
    blocks: jax.Array,
    places: jax.Array,
    pool: jax.Array,
    *,
    scale: float,
    value_dim: int | None,
    cfg: AsyncTLSConfig,
    implementation: Implementation | None,
) -> jax.Array:
    """Attends to the selected tokens of those blocks [B, K, L] that have slots, `places`."""
    chosen = select_tokens(
        query, index, channels, jnp.where(places >= 0, blocks, -1), scale, cfg,
        places=places, implementation=implementation,
    )  # fmt: skip
    batch, num_heads, head_dim = query.shape
    rows, width = pool.shape[0], pool.shape[-1]
    output, _ = async_tls_attention(
        query.reshape(rows, -1, head_dim), pool.reshape(rows, -1, 1, width), None,
        chosen.reshape(rows, 1, -1), scale=scale, implementation=implementation,
        value_columns=(head_dim, width) if value_dim is None else (0, value_dim),
    )  # fmt: skip
    return output.reshape(batch, num_heads, -1)
