"""The selections that AsyncTLS is compared with, as functions of the same signature.

    select(query, key, index, channels, scale, cfg, implementation) -> positions

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
from asa_jax.async_tls.selection import label_query, select_blocks, select_tokens, tokens_of
from asa_jax.async_tls.settings import AsyncTLSConfig
from pallas_kernels import double_sparsity as all_labels
from pallas_kernels.dispatch import Implementation
from pallas_kernels.token_lists import MAX_KEPT_BLOCKS, competing_blocks, list_best


def full(
    query: jax.Array,
    key: jax.Array,
    index: Index,
    channels: jax.Array,
    scale: float,
    cfg: AsyncTLSConfig,
    implementation: Implementation | None = None,
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
    implementation: Implementation | None = None,
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
    blocks = select_blocks(query, index, index.lengths, whole, implementation)
    return tokens_of(blocks, index.lengths, cfg.block_size)


def double_sparsity(
    query: jax.Array,
    key: jax.Array,
    index: Index,
    channels: jax.Array,
    scale: float,
    cfg: AsyncTLSConfig,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Tokens by the labels of all of them (Double Sparsity, Yang et al., 2024).

    See the module for arguments and result.
    """
    return all_labels.best_tokens(
        label_query(query, channels), index.labels, index.lengths, cfg.token_budget,
        cfg.block_size, scale, implementation=implementation,
    )  # fmt: skip


def two_level(
    query: jax.Array,
    key: jax.Array,
    index: Index,
    channels: jax.Array,
    scale: float,
    cfg: AsyncTLSConfig,
    implementation: Implementation | None = None,
) -> jax.Array:
    """AsyncTLS's selection in its synchronous form; see the module for arguments and result."""
    blocks = select_blocks(query, index, index.lengths, cfg, implementation)
    return select_tokens(query, index, channels, blocks, scale, cfg, implementation=implementation)


def oracle_topk(
    query: jax.Array,
    key: jax.Array,
    index: Index,
    channels: jax.Array,
    scale: float,
    cfg: AsyncTLSConfig,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Tokens by their true attention weights; see the module for arguments and result."""
    grouped = query.reshape(query.shape[0], key.shape[2], -1, query.shape[2])
    scores = jnp.einsum("BKGH,BSKH->BKGS", grouped, key, preferred_element_type=jnp.float32)
    lengths, token = index.lengths[:, None, None], jnp.arange(key.shape[1])
    competes, kept = competing_blocks(token // cfg.block_size, lengths, cfg.block_size)
    weights = jax.nn.softmax(scale * scores, axis=-1, where=competes[:, :, None]).sum(2)
    kept = jnp.broadcast_to(kept & (token < lengths), weights.shape)
    weights = jnp.where(competes, weights, -jnp.inf)
    return list_best(weights, kept, cfg.token_budget, MAX_KEPT_BLOCKS * cfg.block_size)
