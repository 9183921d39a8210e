"""Decoding of one layer whose keys and values are on the host, all of it within a program.

State and rules are those of `layer` and `engine`; slots, misses and transfers are found by the
device, which asks the host for nothing. Blocks travel by `pool_exchange`, straight to slots of the
pool. In the lagged form those for step t + 1 are asked for before attention of step t, and travel
beside it: slots that it reads were asked for later than all others and are not given up.

A new tail has a slot as soon as it is on a list. A tail that is full goes to the host with the
exchange that follows its last token, and so before any that could bring it back.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from asa_jax.async_tls.device_slots import NO_BLOCK, DeviceSlots, ask, init_slots, slots_of
from asa_jax.async_tls.index import Index, append
from asa_jax.async_tls.layer import attend_places, joined
from asa_jax.async_tls.pool_exchange import NOTHING, TO_HOST, Pool, exchange, init_pool, join
from asa_jax.async_tls.selection import Lag, drifted, select_blocks
from asa_jax.async_tls.settings import NEVER, AsyncTLSConfig
from pallas_kernels.dispatch import Implementation


class DeviceCounters(NamedTuple):
    """What a layer did, int32, to be summed: so that no step has to.

    Attributes:
        hits: [B * K, L], blocks of lists that had slots.
        misses: [B * K, L], those that had none.
        to_device: [B * K, slots], blocks that were brought to a slot.
        to_host: [B * K, slots], blocks that were brought to the host.
        reselected: [B, K], that the drift guard gave the blocks of their own query.
    """

    hits: Any
    misses: Any
    to_device: Any
    to_host: Any
    reselected: Any


class DeviceLayer(NamedTuple):
    """State of one layer.

    Attributes:
        key_index: of its keys.
        channels: int32 [K, r].
        pool: of B * K rows and blocks [block_size, width]; in the lagged form on its way.
        slots: what it holds, or is about to.
        source: int32 [3], the host's blocks, of `PinnedBlocks.source`.
        lag: of the step before; None in the synchronous form and at the first step behind a prompt.
        counters: of what was asked for.
    """

    key_index: Index
    channels: jax.Array
    pool: Pool
    slots: DeviceSlots
    source: jax.Array
    lag: Lag | None
    counters: DeviceCounters


@dataclasses.dataclass(frozen=True)
class DeviceLayerConfig:
    """What is the same for all layers.

    Attributes:
        sizes: of the two levels.
        lagged: whether blocks are those that the query of the step before chose.
        scale: factor on the scores.
        value_dim: for absorbed latents, whose values are the first features of their keys.
        implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.
    """

    sizes: AsyncTLSConfig
    lagged: bool
    scale: float
    value_dim: int | None
    implementation: Implementation | None


def init_layer(
    index: Index, channels: jax.Array, pool: jax.Array, tails: jax.Array, source: jax.Array
) -> DeviceLayer:
    """A layer behind prompts.

    Args:
        index: of the prompts.
        channels: int32 [K, r].
        pool: [B * K, slots, block_size, width], whose first slots hold the last blocks of prompts.
        tails: int32 [B * K], which these are.
        source: int32 [3], the host's blocks, which hold the prompts.
    """
    rows, num_slots = pool.shape[:2]
    lists, slots, heads = (rows, num_slots // 2), (rows, num_slots), index.bounds.shape[:2]
    counters = [jnp.zeros(shape, jnp.int32) for shape in (lists, lists, slots, slots, heads)]
    return DeviceLayer(
        index, channels, init_pool(pool), init_slots(tails, num_slots), source, None,
        DeviceCounters(*counters),
    )  # fmt: skip


def step(
    state: DeviceLayer, query: jax.Array, key: jax.Array, value: Any, *, cfg: DeviceLayerConfig
) -> tuple[jax.Array, DeviceLayer]:
    """Appends a token to every row and attends.

    Args:
        state: of the layer.
        query: [B, N, H].
        key: [B, K, H].
        value: [B, K, h], or None with value_dim.
        cfg: sizes and form.

    Returns:
        [B, N, h], and the state.
    """
    state = state._replace(key_index=append(state.key_index, key[:, None], state.channels))
    pending: Any = joined(key, value).reshape(len(state.pool.blocks), -1)
    if state.lag is None or cfg.sizes.drift_cosine > NEVER:
        state, blocks, asked = _blocks_of_this_query(state, query, cfg)
        state = _bring(state, asked, 0, pending)
        state, pending = state._replace(pool=join(state.pool)), None
    else:
        blocks = state.lag.blocks
    if cfg.lagged:
        following = _choose(state, query, 1, cfg)
        state = _bring(state, following, 1, pending)._replace(lag=Lag(following, query))
    places = slots_of(state.slots, _by_row(blocks)).reshape(blocks.shape)
    mixed = attend_places(
        query, state.key_index, state.channels, blocks, places, state.pool.blocks,
        scale=cfg.scale, value_dim=cfg.value_dim, cfg=cfg.sizes,
        implementation=cfg.implementation,
    )  # fmt: skip
    return mixed, state


def _choose(state: DeviceLayer, query: jax.Array, ahead: int, cfg: DeviceLayerConfig) -> jax.Array:
    """The blocks [B, K, L] of level 1, to be read at so many tokens more."""
    lengths = state.key_index.lengths + ahead
    return select_blocks(query, state.key_index, lengths, cfg.sizes, cfg.implementation)


def _blocks_of_this_query(
    state: DeviceLayer, query: jax.Array, cfg: DeviceLayerConfig
) -> tuple[DeviceLayer, jax.Array, jax.Array]:
    """The blocks [B, K, L] to attend to, and those of them that were not asked for yet."""
    fresh = _choose(state, query, 0, cfg)
    if state.lag is None:
        return state, fresh, fresh
    turned = drifted(query, state.lag.query, fresh.shape[1], cfg.sizes.drift_cosine)
    counters = state.counters
    counters = counters._replace(reselected=counters.reselected + turned)
    blocks = jnp.where(turned[..., None], fresh, state.lag.blocks)
    asked = jnp.where(turned[..., None], fresh, NO_BLOCK)
    return state._replace(counters=counters), blocks, asked


def _bring(
    state: DeviceLayer, blocks: jax.Array, ahead: int, token: jax.Array | None
) -> DeviceLayer:
    """Asks for blocks [B, K, L], to be read at so many tokens more, and starts their transfer.

    `token` [B * K, width] is the one that the index was last given, unless it is in the pool; so it
    is given in the first exchange of a step, before which that of the lag is under way.
    """
    rows, block_size = jnp.arange(len(state.pool.blocks)), state.pool.blocks.shape[2]
    num_blocks = state.key_index.bounds.shape[2]
    lengths = jnp.repeat(state.key_index.lengths, len(rows) // len(blocks))
    tails = (lengths - 1) // block_size
    slots, incoming, found = ask(state.slots, _by_row(blocks), 2 * lengths + ahead)
    first = num_blocks * rows[:, None]
    fetched = (incoming >= 0) & (incoming < tails[:, None])  # a new tail comes from nowhere
    moves = jnp.where(fetched, first + incoming, NOTHING)
    stored, pool = jnp.zeros_like(fetched), state.pool
    if token is not None:
        (slot,) = slots_of(slots, tails[:, None]).T
        place = rows, slot, (lengths - 1) % block_size
        written = pool.blocks.at[place].set(token.astype(pool.blocks.dtype))
        # Without the barrier XLA for the CPU copies a pool of one row, which `exchange` refuses.
        pool = pool._replace(blocks=jax.lax.optimization_barrier(written))
        full = lengths % block_size == 0
        stored = (slots.block_of == tails[:, None]) & full[:, None]
        moves = jnp.where(stored, TO_HOST - first - tails[:, None], moves)
    travelling = _by_row(blocks) > 0
    travelling &= _by_row(blocks) < ((lengths + ahead - 1) // block_size - 1)[:, None]
    counted = travelling & found, travelling & ~found, fetched, stored
    counters = [old + new for old, new in zip(state.counters[:-1], counted, strict=True)]
    return state._replace(
        pool=exchange(
            pool, state.source, moves, under_way=token is not None and state.lag is not None
        ),
        slots=slots,
        counters=DeviceCounters._make([*counters, state.counters.reselected]),
    )  # fmt: skip


def _by_row(blocks: jax.Array) -> jax.Array:
    return blocks.reshape(-1, blocks.shape[2])
