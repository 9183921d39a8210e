"""The selections that AsyncTLS is compared with."""

import dataclasses
import functools

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from asa_jax.async_tls import decoders
from asa_jax.async_tls.labels import dequantise
from asa_jax.async_tls.token_attention import attend_tokens
from tests.async_tls.cases import (
    BATCH,
    BLOCK,
    GROUP,
    HEADS,
    LENGTH,
    SCALE,
    SMALL,
    Sample,
    dense,
    jit,
    kept_blocks,
)

NAMES = ("full", "quest", "double_sparsity", "two_level", "oracle_topk")
# Of whole blocks, so that every decoder has the same number of tokens.
EVEN = dataclasses.replace(SMALL, token_budget=2 * BLOCK)
ALL = dataclasses.replace(SMALL, num_blocks=LENGTH // BLOCK, token_budget=LENGTH)


@functools.partial(jit, static_argnames="cfg")
def select(query, key, index, channels, cfg):
    return {
        name: getattr(decoders, name)(query, key, index, channels, SCALE, cfg) for name in NAMES
    }


attend = jit(functools.partial(attend_tokens, scale=SCALE))


def chosen_of(positions, length):
    """Positions of one row and head but for those that are always kept."""
    assert len(set(positions[positions >= 0])) == (positions >= 0).sum()
    return {p for p in positions if p >= 0 and p // BLOCK not in kept_blocks(length)}


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), lengths=st.tuples(*[st.integers(1, LENGTH)] * 2))
def test_each_decoder_takes_the_best_by_its_own_measure(seed, lengths):
    sample = Sample(seed)
    index, query = sample.index(lengths), sample.queries[0]
    selected = select(query, sample.key, index, sample.channels, EVEN)
    labels, key = np.asarray(dequantise(index.labels)), np.asarray(sample.key)
    grouped = np.asarray(query).reshape(BATCH, HEADS, GROUP, -1)
    for row, head in np.ndindex(BATCH, HEADS):
        length, parts = lengths[row], grouped[row, head]
        chosen = {n: chosen_of(np.asarray(x)[row, head], length) for n, x in selected.items()}
        others = np.array([p for p in range(length) if p // BLOCK not in kept_blocks(length)], int)
        assert chosen["full"] == set(others)
        for name, scores in (
            ("oracle_topk", parts @ key[row, others, head].T),
            ("double_sparsity", parts[:, sample.channels[head]] @ labels[row, head, others].T),
        ):
            weights = np.exp(SCALE * scores)
            weights = (weights / weights.sum(1, keepdims=True)).sum(0)
            best = others[np.argsort(-weights)][: EVEN.token_budget]
            assert chosen[name] == set(best)
        assert {p // BLOCK for p in chosen["quest"]} == set(
            _best_blocks(key, parts, others, row, head)
        )
        assert len(chosen["quest"]) == min(EVEN.token_budget, len(others))
        assert len(chosen["two_level"]) == min(EVEN.token_budget, len(others))


def _best_blocks(key, parts, others, row, head):
    """Blocks by Quest's bound as it is published: the sum of max(q M, q m) over channels."""
    blocks, bounds = sorted({p // BLOCK for p in others}), []
    for block in blocks:
        keys = key[row, block * BLOCK : (block + 1) * BLOCK, head]
        high, low = keys.max(0), keys.min(0)
        bounds.append(np.maximum(parts * high, parts * low).sum(1).max())
    return [blocks[i] for i in np.argsort(bounds)[::-1][: EVEN.token_budget // BLOCK]]


def test_with_budgets_that_cover_everything_all_are_dense_attention():
    sample, lengths = Sample(1), np.array([LENGTH, 11])
    index = sample.index(lengths)
    expected = np.asarray(dense(sample.queries[0], sample.key, sample.value, index.lengths))
    selected = select(sample.queries[0], sample.key, index, sample.channels, ALL)
    for positions in selected.values():
        output = attend(sample.queries[0], sample.key, sample.value, positions)
        np.testing.assert_allclose(np.asarray(output), expected, atol=1e-5)


def test_a_budget_below_a_block_is_refused_by_quest():
    sample = Sample(0)
    cfg = dataclasses.replace(SMALL, token_budget=BLOCK - 1)
    with pytest.raises(ValueError, match="token_budget: 3 is less than a block, 4"):
        decoders.quest(
            sample.queries[0], sample.key, sample.index([5, 5]), jnp.asarray(0), SCALE, cfg
        )
