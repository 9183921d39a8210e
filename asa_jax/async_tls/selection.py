"""Which tokens a query attends to: blocks by their bounds, then tokens in them by their labels.

    M_t = the num_blocks blocks of the greatest max_g u(q_t,g, b)                      level 1
    S_t = the token_budget tokens of M of the greatest sum_g softmax_s(a(q_t,g, s))    level 2

over the query heads g of a key head, M being M_t in the synchronous form and M_{t-1} in the lagged
one, in which M_t only says what to fetch for step t + 1. The first block, the tail and the block
before it are always attended to, outside both budgets, and stand on every list of blocks.

M_t is chosen beside what step t + 1 always keeps; so nothing is lost when a new tail begins, and
the lagged form differs from the synchronous one by the query that chose and by nothing else.

Both levels are operations of `pallas_kernels`, which have kernels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from asa_jax.async_tls.index import Index
from asa_jax.async_tls.labels import take_channels
from asa_jax.async_tls.settings import NEVER, AsyncTLSConfig
from pallas_kernels.async_tls_select_blocks import async_tls_select_blocks
from pallas_kernels.async_tls_select_tokens import async_tls_select_tokens
from pallas_kernels.dispatch import Implementation


class Lag(NamedTuple):
    """What the lagged form remembers of the step before.

    Attributes:
        blocks: int32 [B, K, L], M_{t-1} and what step t always keeps.
        query: [B, N, H], q_{t-1}.
    """

    blocks: Any
    query: Any


def select_blocks(
    query: jax.Array,
    index: Index,
    lengths: jax.Array,
    cfg: AsyncTLSConfig,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Level 1: the blocks whose bounds are greatest for some query head of a key head.

    Args:
        query: [B, N, H].
        index: of the keys.
        lengths: int32 [B], tokens at the step that will use the blocks, that of the query or the
            next; what it always keeps does not compete and is on the list.
        cfg: sizes.
        implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
        int32 [B, K, L], ascending, -1 at the end; L = num_blocks + 3.
    """
    return async_tls_select_blocks(
        query, index.bounds, lengths,
        num_blocks=cfg.num_blocks, block_size=cfg.block_size, implementation=implementation,
    )  # fmt: skip


def select_tokens(
    query: jax.Array,
    index: Index,
    channels: jax.Array,
    blocks: jax.Array,
    scale: float,
    cfg: AsyncTLSConfig,
    *,
    places: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Level 2: the tokens of blocks with the greatest estimated weights, and those always kept.

    Args:
        query: [B, N, H].
        index: of the keys.
        channels: int32 [K, r], of the labels.
        blocks: int32 [B, K, L], those that are always kept included, -1 for none.
        scale: factor on the scores, as in attention.
        cfg: sizes.
        places: int32 [B, K, L], slots of the blocks; None for positions in the text.
        implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
        Positions int32 [B, K, token_budget + 3 block_size], or what stands at these offsets of the
        slots; none twice, -1 for none.
    """
    return async_tls_select_tokens(
        label_query(query, channels), index.labels, blocks, index.lengths,
        token_budget=cfg.token_budget, block_size=cfg.block_size, scale=scale, places=places,
        implementation=implementation,
    )  # fmt: skip


def label_query(query: jax.Array, channels: jax.Array) -> jax.Array:
    """The channels [K, r] of labels out of queries [B, N, H]: [B, N, r]."""
    group = query.shape[1] // len(channels)
    return take_channels(query, jnp.repeat(channels, group, axis=0))


def synchronous_step(
    query: jax.Array, index: Index, channels: jax.Array, scale: float, cfg: AsyncTLSConfig
) -> tuple[jax.Array, Lag]:
    """The synchronous form, and the first step of the lagged one; arguments as `select_tokens`.

    Returns:
        Positions int32 [B, K, S'], and what the lagged form needs at the next step.
    """
    blocks = select_blocks(query, index, index.lengths, cfg)
    tokens = select_tokens(query, index, channels, blocks, scale, cfg)
    return tokens, Lag(select_blocks(query, index, index.lengths + 1, cfg), query)


def lagged_step(
    query: jax.Array, index: Index, channels: jax.Array, lag: Lag, scale: float, cfg: AsyncTLSConfig
) -> tuple[jax.Array, Lag, jax.Array]:
    """The lagged form: tokens by this query, in the blocks that the query of the last step chose.

    Args:
        query: [B, N, H].
        index: of the keys, one token a row longer than at the step of `lag`.
        channels: int32 [K, r].
        lag: what the step before returned.
        scale: factor on the scores.
        cfg: sizes.

    Returns:
        Positions int32 [B, K, S'], what the next step needs, and which key heads [B, K] turned
        away and were given the blocks of this query instead.
    """
    turned = drifted(query, lag.query, index.bounds.shape[1], cfg.drift_cosine)
    blocks = lag.blocks
    if cfg.drift_cosine > NEVER:
        fresh = select_blocks(query, index, index.lengths, cfg)
        blocks = jnp.where(turned[..., None], fresh, blocks)
    tokens = select_tokens(query, index, channels, blocks, scale, cfg)
    return tokens, Lag(select_blocks(query, index, index.lengths + 1, cfg), query), turned


def drifted(query: jax.Array, before: jax.Array, num_kv_heads: int, cosine: float) -> jax.Array:
    """Drift guard: key heads of which some query head turned away since the step before.

    Args:
        query: [B, N, H].
        before: [B, N, H], the query of the step before.
        num_kv_heads: K.
        cosine: of the angle beyond which a query has turned away; -1: none ever has.

    Returns:
        bool [B, K].
    """
    now, before = (x.astype(jnp.float32) for x in (query, before))
    norms = jnp.linalg.norm(now, axis=-1) * jnp.linalg.norm(before, axis=-1)
    # Rounding can put the cosine of opposite queries below -1.
    away = ((now * before).sum(-1) < cosine * norms) & (cosine > NEVER)
    return away.reshape(away.shape[0], num_kv_heads, -1).any(-1)


def tokens_of(blocks: jax.Array, lengths: jax.Array, block_size: int) -> jax.Array:
    """Positions of all tokens of blocks.

    Args:
        blocks: int32 [B, K, L], -1 for none.
        lengths: int32 [B].
        block_size: tokens of a block.

    Returns:
        int32 [B, K, L * block_size], -1 where there is none.
    """
    positions = blocks[..., None] * block_size + jnp.arange(block_size)
    there = (blocks[..., None] >= 0) & (positions < lengths[:, None, None, None])
    return jnp.where(there, positions, -1).reshape(*blocks.shape[:2], -1)
