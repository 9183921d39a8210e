"""Definition of async_tls_select_tokens in XLA."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.masked_attention import statistics_dtype
from pallas_kernels.token_lists import MAX_KEPT_BLOCKS, competing_blocks, list_best


class Labels(NamedTuple):
    """Labels of tokens: some channels of their keys in four bits, zero + step * code.

    Attributes:
      codes: uint8 [B, K, S, r / 2], in byte j channel j, its low half, and channel j + r / 2.
      step: float16 [B, K, S].
      zero: float16 [B, K, S].
    """

    codes: Any
    step: Any
    zero: Any


def async_tls_select_tokens(
    query: jax.Array,
    labels: Labels,
    block_indices: jax.Array,
    lengths: jax.Array,
    token_budget: int,
    block_size: int,
    scale: float,
    places: jax.Array | None = None,
) -> jax.Array:
    """See `api.async_tls_select_tokens`; gathers the labels of the blocks."""
    lengths = lengths[:, None, None]
    competes, kept = competing_blocks(block_indices, lengths, block_size)
    positions = _tokens_of(block_indices, block_size)
    competes, kept = (
        jnp.repeat(x, block_size, axis=2) & (positions < lengths) for x in (competes, kept)
    )
    weights = _weights(query, labels, positions, competes, scale)
    columns = list_best(
        jnp.where(competes, weights, -jnp.inf), kept, token_budget, MAX_KEPT_BLOCKS * block_size
    )
    listed = positions if places is None else _tokens_of(places, block_size)
    chosen = jnp.take_along_axis(listed, jnp.maximum(columns, 0), axis=2)
    return jnp.where(columns >= 0, chosen, -1)


def _tokens_of(blocks: jax.Array, block_size: int) -> jax.Array:
    """Numbers of the tokens of blocks: [B, K, L] to [B, K, L * block_size]."""
    tokens = blocks[..., None] * block_size + jnp.arange(block_size)
    return tokens.reshape(*blocks.shape[:2], -1)


def _weights(
    query: jax.Array, labels: Labels, positions: jax.Array, competes: jax.Array, scale: float
) -> jax.Array:
    """Softmax of label scores over those that compete, summed over query heads: [B, K, s]."""
    grouped = query.reshape(*positions.shape[:2], -1, query.shape[2])
    codes = jnp.take_along_axis(labels.codes, positions[..., None], axis=2, mode="clip")
    step, zero = (
        jnp.take_along_axis(x, positions, axis=2, mode="clip") for x in (labels.step, labels.zero)
    )
    scores = scale * label_scores(grouped, Labels(codes, step, zero))
    return jax.nn.softmax(scores, axis=-1, where=competes[:, :, None]).sum(2)


def unpack(codes: jax.Array) -> jax.Array:
    """Codes 0 .. 15 of bytes [..., r / 2]: uint8 [..., r]."""
    return jnp.concatenate([codes & 15, codes >> 4], axis=-1)


def label_scores(query: jax.Array, labels: Labels) -> jax.Array:
    """Scores sum_c q_c (zero + step code_c), from the codes as they are.

    Args:
      query: [B, K, G, r], the channels of the labels.
      labels: Over [B, K, S].

    Returns:
      float32 [B, K, G, S], float64 for queries of float64.
    """
    sums = statistics_dtype(query.dtype)
    codes = unpack(labels.codes).astype(query.dtype)
    products = jnp.einsum("BKGR,BKSR->BKGS", query, codes, preferred_element_type=sums)
    step, zero = (x.astype(sums)[:, :, None] for x in (labels.step, labels.zero))
    return step * products + zero * query.astype(sums).sum(-1)[..., None]
