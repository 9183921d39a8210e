"""The selections that AsyncTLS is compared with, as functions of the same signature.

    select(query, key, index, channels, scale, cfg) -> positions

with query [B, N, H], key [B, S, K, H], the index of the keys, channels int32 [K, r] and positions
int32 [B, K, S'], -1 for none, to be attended to by `token_attention.attend_tokens`. All get the
same token budget, the same merging over the query heads of a key head and the same tokens that are
always kept, which the published forms treat each in its own way; so they differ by how they choose
and by nothing else.
"""

import dataclasses

import jax
import jax.numpy as jnp

from asa_jax.async_tls.index import Index
from asa_jax.async_tls.selection import (
    best_tokens,
    candidate_tokens,
    select_blocks,
    select_tokens,
    with_always_kept,
)
from asa_jax.async_tls.settings import AsyncTLSConfig


def full(
    query: jax.Array,
    key: jax.Array,
    index: Index,
    channels: jax.Array,
    scale: float,
    cfg: AsyncTLSConfig,
) -> jax.Array:
    """All tokens; see the module for arguments and result."""
    positions = jnp.arange(key.shape[1])
    positions = jnp.where(positions < index.lengths[:, None], positions, -1)[:, None]
    return jnp.broadcast_to(positions, (key.shape[0], key.shape[2], key.shape[1]))


def quest(
    query: jax.Array,
    key: jax.Array,
    index: Index,
    channels: jax.Array,
    scale: float,
    cfg: AsyncTLSConfig,
) -> jax.Array:
    """Whole blocks of the greatest bounds (Quest, Tang et al., 2024), token_budget tokens of them.

    See the module for arguments and result.

    Raises:
        ValueError: the budget is less than a block.
    """
    if cfg.token_budget < cfg.block_size:
        raise ValueError(f"token_budget: {cfg.token_budget} is less than a block, {cfg.block_size}")
    number = cfg.token_budget // cfg.block_size
    whole = dataclasses.replace(cfg, num_blocks=number, token_budget=number * cfg.block_size)
    blocks = select_blocks(query, index, index.lengths, whole)
    positions = candidate_tokens(blocks, index.lengths, cfg.block_size)
    return with_always_kept(positions, index.lengths, cfg.block_size)


def double_sparsity(
    query: jax.Array,
    key: jax.Array,
    index: Index,
    channels: jax.Array,
    scale: float,
    cfg: AsyncTLSConfig,
) -> jax.Array:
    """Tokens by the labels of all of them (Double Sparsity, Yang et al., 2024).

    See the module for arguments and result.
    """
    blocks = _all_blocks(key, cfg.block_size)
    return select_tokens(query, index, channels, blocks, scale, cfg)


def two_level(
    query: jax.Array,
    key: jax.Array,
    index: Index,
    channels: jax.Array,
    scale: float,
    cfg: AsyncTLSConfig,
) -> jax.Array:
    """AsyncTLS's selection in its synchronous form; see the module for arguments and result."""
    blocks = select_blocks(query, index, index.lengths, cfg)
    return select_tokens(query, index, channels, blocks, scale, cfg)


def oracle_topk(
    query: jax.Array,
    key: jax.Array,
    index: Index,
    channels: jax.Array,
    scale: float,
    cfg: AsyncTLSConfig,
) -> jax.Array:
    """Tokens by their true attention weights; see the module for arguments and result."""
    grouped = query.reshape(query.shape[0], key.shape[2], -1, query.shape[2])
    scores = jnp.einsum("BKGH,BSKH->BKGS", grouped, key, preferred_element_type=jnp.float32)
    positions = candidate_tokens(_all_blocks(key, cfg.block_size), index.lengths, cfg.block_size)
    there = (positions >= 0)[:, :, None]
    weights = jax.nn.softmax(scale * scores, axis=-1, where=there).sum(2)
    chosen = best_tokens(weights, positions, cfg.token_budget)
    return with_always_kept(chosen, index.lengths, cfg.block_size)


def _all_blocks(key: jax.Array, block_size: int) -> jax.Array:
    batch, length, num_kv_heads, _ = key.shape
    blocks = jnp.arange(length // block_size, dtype=jnp.int32)
    return jnp.broadcast_to(blocks, (batch, num_kv_heads, length // block_size))
