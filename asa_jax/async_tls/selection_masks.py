"""The choices of all decoders for many steps of one text at once, as masks.

What `decoders.py` and `selection.py` choose for one step as a list of positions is here a mask over
all tokens, because the steps of a known text can be computed together; tests hold the two equal.
Numbers kept are traced, so that one program serves every budget.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from asa_jax.async_tls.labels import make_labels, take_channels
from pallas_kernels.async_tls_select_tokens.reference import label_scores

Decoder = Literal["full", "quest", "double_sparsity", "oracle_topk", "synchronous", "lagged"]
_BITS = 32


class Budgets(NamedTuple):
    """How much is kept, int32 []: tokens, and blocks of level 1."""

    tokens: Any
    blocks: Any


class Steps(NamedTuple):
    """T steps of one text and the S tokens that it has at the end.

    Attributes:
        query: [T, N, H].
        key: [S, K, H], S a multiple of the block size.
        positions: int32 [T], of the queries: each sees the tokens up to its own.
        weights: float32 [T, K, G, S], softmax of the scores over the tokens that a query sees.
    """

    query: Any
    key: Any
    positions: Any
    weights: Any


def kept_tokens(
    steps: Steps,
    channels: jax.Array,
    budgets: Budgets,
    *,
    decoder: Decoder,
    scale: float,
    block_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Which tokens each step attends to.

    Args:
        steps: queries and keys.
        channels: int32 [K, r], of the labels.
        budgets: how much is kept; what is always kept comes on top.
        decoder: that chooses.
        scale: factor on the scores.
        block_size: tokens of a block.

    Returns:
        bool [T, K, S], and the share of the best tokens by `weights`, as many as the budget, that
        are among them, float32 [].
    """
    number = jnp.arange(steps.key.shape[0] // block_size)
    tail = (steps.positions // block_size)[:, None]
    candidate_blocks = (number > 0) & (number < tail - 1)
    candidates = jnp.repeat(candidate_blocks, block_size, axis=1)[:, None]
    seen = (jnp.arange(steps.key.shape[0]) <= steps.positions[:, None])[:, None]
    if decoder == "full":
        shape = (*steps.weights.shape[:2], steps.key.shape[0])
        return jnp.broadcast_to(seen, shape), jnp.float32(1)
    best = keep_best(_summed(steps.weights, candidates), candidates, budgets.tokens)
    if decoder == "oracle_topk":
        chosen = best
    elif decoder == "quest":
        blocks = keep_best(
            _bounds(steps, block_size), candidate_blocks[:, None], budgets.tokens // block_size
        )
        chosen = jnp.repeat(blocks, block_size, axis=2)
    else:
        if decoder != "double_sparsity":
            bounds = _bounds(steps, block_size)
            if decoder == "lagged":  # the first step has none before it
                bounds = jnp.concatenate([bounds[:1], bounds[:-1]])
            blocks = keep_best(bounds, candidate_blocks[:, None], budgets.blocks)
            candidates = jnp.repeat(blocks, block_size, axis=2)
        estimates = _estimated(steps, channels, candidates, scale)
        chosen = keep_best(estimates, candidates, budgets.tokens)
    recall = (best & chosen).sum() / jnp.maximum(best.sum(), 1)
    always = seen & ~jnp.repeat(candidate_blocks, block_size, axis=1)[:, None]
    return chosen | always, recall


def keep_best(scores: jax.Array, there: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` greatest of scores [..., n] among those that are there, of equal ones the first.

    The count-th greatest is found bit by bit, which no sort is needed for.

    Args:
        scores: float32, no NaN.
        there: bool, broadcasts to scores.
        count: int32 [].

    Returns:
        bool [..., n].
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(1 << (_BITS - 1))
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)
    ordered = jnp.where(there, ordered, 0)

    def add_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (jnp.uint32(1) << (_BITS - 1 - i).astype(jnp.uint32))
        enough = (ordered >= higher[..., None]).sum(-1) >= count
        return jnp.where(enough, higher, threshold)

    zero = jnp.zeros(scores.shape[:-1], jnp.uint32)
    threshold = jax.lax.fori_loop(0, _BITS, add_bit, zero)[..., None]
    above = ordered > threshold
    equal = (ordered == threshold) & there
    room = count - above.sum(-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= room))


def _bounds(steps: Steps, block_size: int) -> jax.Array:
    """Quest's bound of blocks that are full, the greatest over G: [T, K, C]; see `index.py`."""
    blocks = steps.key.reshape(-1, block_size, *steps.key.shape[1:])
    bounds = jnp.concatenate([blocks.max(1), -blocks.min(1)], axis=-1)
    grouped = _grouped(steps)
    signs = jax.nn.relu(jnp.concatenate([grouped, -grouped], axis=-1))
    return jnp.einsum("TKGH,CKH->TKGC", signs, bounds, preferred_element_type=jnp.float32).max(2)


def _estimated(steps: Steps, channels: jax.Array, candidates: jax.Array, scale: float) -> jax.Array:
    """Softmax of label scores over the candidates [T, K, S], summed over G: [T, K, S]."""
    labels = jax.tree.map(lambda x: x.swapaxes(0, 1)[None], make_labels(steps.key, channels))
    parts = take_channels(_grouped(steps).swapaxes(1, 2), channels)  # [T, G, K, r]
    size, group, heads, _ = parts.shape
    rows = parts.transpose(2, 0, 1, 3).reshape(1, heads, size * group, -1)
    scores = scale * label_scores(rows, labels).reshape(heads, size, group, -1).swapaxes(0, 1)
    return jax.nn.softmax(scores, axis=-1, where=candidates[:, :, None]).sum(2)


def _summed(weights: jax.Array, candidates: jax.Array) -> jax.Array:
    """Softmax over the candidates alone, summed over G: [T, K, S]."""
    weights = jnp.where(candidates[:, :, None], weights, 0)
    total = jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return (weights / total).sum(2)


def _grouped(steps: Steps) -> jax.Array:
    """Queries [T, K, G, H]."""
    return steps.query.reshape(len(steps.query), steps.key.shape[1], -1, steps.query.shape[-1])
