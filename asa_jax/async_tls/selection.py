"""Which tokens a query attends to: blocks by their bounds, then tokens in them by their labels.

    M_t = the num_blocks blocks of the greatest max_g u(q_t,g, b)                      level 1
    S_t = the token_budget tokens of M of the greatest sum_g softmax_s(a(q_t,g, s))    level 2

over the query heads g of a key head, M being M_t in the synchronous form and M_{t-1} in the lagged
one, in which M_t only says what to fetch for step t + 1. The first block, the tail and the block
before it are always attended to, outside both budgets.

M_t leaves out what step t + 1 always keeps; so nothing is lost when a new tail begins, and the
lagged form differs from the synchronous one by the query that chose and by nothing else.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from asa_jax.async_tls.index import Index, block_scores
from asa_jax.async_tls.labels import label_scores, take_channels
from asa_jax.async_tls.settings import NEVER, AsyncTLSConfig


class Lag(NamedTuple):
    """What the lagged form remembers of the step before.

    Attributes:
        blocks: int32 [B, K, L], M_{t-1}.
        query: [B, N, H], q_{t-1}.
    """

    blocks: Any
    query: Any


def select_blocks(
    query: jax.Array, index: Index, lengths: jax.Array, cfg: AsyncTLSConfig
) -> jax.Array:
    """Level 1: the blocks whose bounds are greatest for some query head of a key head.

    Args:
        query: [B, N, H].
        index: of the keys.
        lengths: int32 [B], tokens at the step that will use the blocks, that of the query or the
            next; what it always keeps is not chosen.
        cfg: sizes.

    Returns:
        int32 [B, K, L], best first, -1 at the end; L = num_blocks, or all blocks if fewer.
    """
    scores = block_scores(query, index).max(2)
    number = jnp.arange(scores.shape[2])
    kept = _is_always_kept(number, lengths[:, None], cfg.block_size)
    scores = jnp.where(kept[:, None], -jnp.inf, scores)
    best, blocks = jax.lax.top_k(scores, min(cfg.num_blocks, scores.shape[2]))
    return jnp.where(best > -jnp.inf, blocks, -1).astype(jnp.int32)


def select_tokens(
    query: jax.Array,
    index: Index,
    channels: jax.Array,
    blocks: jax.Array,
    scale: float,
    cfg: AsyncTLSConfig,
) -> jax.Array:
    """Level 2: the tokens of blocks with the greatest estimated weights, and those always kept.

    Args:
        query: [B, N, H].
        index: of the keys.
        channels: int32 [K, r], of the labels.
        blocks: int32 [B, K, L], -1 for none; those that are always kept are passed over.
        scale: factor on the scores, as in attention.
        cfg: sizes.

    Returns:
        Positions int32 [B, K, S'], no position twice, -1 for none: S' = token_budget (or all tokens
        of the blocks if fewer) + 3 block_size.
    """
    positions = candidate_tokens(blocks, index.lengths, cfg.block_size)
    weights = _estimated_weights(query, index, channels, positions, scale)
    chosen = best_tokens(weights, positions, cfg.token_budget)
    return with_always_kept(chosen, index.lengths, cfg.block_size)


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


def always_kept_blocks(lengths: jax.Array, block_size: int) -> jax.Array:
    """The first block, the tail and the one before it: int32 [B, 3], each once, -1 for none."""
    tail = (lengths - 1) // block_size
    previous = jnp.where(tail > 1, tail - 1, -1)
    return jnp.stack([jnp.where(tail > 0, 0, -1), previous, tail], axis=1).astype(jnp.int32)


def _is_always_kept(blocks: jax.Array, lengths: jax.Array, block_size: int) -> jax.Array:
    tail = (lengths - 1) // block_size
    return (blocks == 0) | ((blocks >= tail - 1) & (blocks <= tail))


def candidate_tokens(blocks: jax.Array, lengths: jax.Array, block_size: int) -> jax.Array:
    """Positions of the tokens of blocks that are not kept anyway.

    Args:
        blocks: int32 [B, K, L], -1 for none.
        lengths: int32 [B].
        block_size: tokens of a block.

    Returns:
        int32 [B, K, L * block_size], -1 for none.
    """
    kept = _is_always_kept(blocks, lengths[:, None, None], block_size)
    return _tokens_of(jnp.where(kept, -1, blocks), lengths, block_size)


def best_tokens(weights: jax.Array, positions: jax.Array, budget: int) -> jax.Array:
    """The positions [B, K, min(budget, s)] of the greatest of weights [B, K, s], -1 for none."""
    weights = jnp.where(positions >= 0, weights, -1.0)
    best, place = jax.lax.top_k(weights, min(budget, weights.shape[2]))
    return jnp.where(best >= 0, jnp.take_along_axis(positions, place, axis=2), -1)


def with_always_kept(chosen: jax.Array, lengths: jax.Array, block_size: int) -> jax.Array:
    """Adds the tokens that are always kept to positions: [B, K, s] to [B, K, s + 3 block_size]."""
    always = _tokens_of(always_kept_blocks(lengths, block_size)[:, None], lengths, block_size)
    always = jnp.broadcast_to(always, (*chosen.shape[:2], always.shape[2]))
    return jnp.concatenate([chosen, always], axis=2)


def _tokens_of(blocks: jax.Array, lengths: jax.Array, block_size: int) -> jax.Array:
    """Positions of the tokens of blocks [B, k, L]: [B, k, L * block_size], -1 where none is."""
    positions = blocks[..., None] * block_size + jnp.arange(block_size)
    there = (blocks[..., None] >= 0) & (positions < lengths[:, None, None, None])
    return jnp.where(there, positions, -1).reshape(*blocks.shape[:2], -1)


def _estimated_weights(
    query: jax.Array, index: Index, channels: jax.Array, positions: jax.Array, scale: float
) -> jax.Array:
    """Softmax of label scores over positions [B, K, s], summed over G: [B, K, s]."""
    rows, heads = (jnp.arange(n) for n in positions.shape[:2])
    labels = jax.tree.map(lambda x: x[rows[:, None, None], heads[:, None], positions], index.labels)
    grouped = query.reshape(*positions.shape[:2], -1, query.shape[2])
    parts = take_channels(grouped.swapaxes(1, 2), channels).swapaxes(1, 2)
    scores = scale * label_scores(parts, labels)
    return jax.nn.softmax(scores, axis=-1, where=(positions >= 0)[:, :, None]).sum(2)
