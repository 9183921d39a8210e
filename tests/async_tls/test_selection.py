"""Selection of blocks and tokens, synchronous and lagged."""

import dataclasses
import functools

import chex
import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from asa_jax.async_tls.labels import dequantise
from asa_jax.async_tls.selection import (
    drifted,
    lagged_step,
    select_blocks,
    synchronous_step,
)
from asa_jax.async_tls.settings import AsyncTLSConfig
from asa_jax.async_tls.token_attention import attend_tokens
from asa_jax.errors import ConfigError
from pallas_kernels.async_tls_select_blocks.reference import block_scores
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

ALL = dataclasses.replace(SMALL, num_blocks=LENGTH // BLOCK, token_budget=LENGTH)
GUARDED = dataclasses.replace(SMALL, drift_cosine=0.9)

choose = jit(select_blocks, static_argnames="cfg")
synchronous = jit(functools.partial(synchronous_step, scale=SCALE), static_argnames="cfg")
lagged = jit(functools.partial(lagged_step, scale=SCALE), static_argnames="cfg")
attend = jit(functools.partial(attend_tokens, scale=SCALE))
score = jit(block_scores)
any_lengths = st.tuples(*[st.integers(1, LENGTH - 2)] * BATCH)
few = hypothesis.settings(max_examples=20, deadline=None)


@few
@hypothesis.given(seed=st.integers(0, 2**32 - 1), lengths=any_lengths)
def test_each_level_keeps_the_best_and_what_is_always_kept(seed, lengths):
    """Against a loop in numpy over rows and heads."""
    sample = Sample(seed)
    index, query = sample.index(lengths), sample.queries[0]
    blocks = np.asarray(choose(query, index, index.lengths, cfg=SMALL))
    positions = np.asarray(synchronous(query, index, sample.channels, cfg=SMALL)[0])
    bounds, labels = (
        np.asarray(score(query, index.bounds)).max(2),
        np.asarray(dequantise(index.labels)),
    )
    for row, length in enumerate(lengths):
        kept = kept_blocks(length)
        for head in range(HEADS):
            order = np.argsort(-bounds[row, head])
            best = [b for b in order if b not in kept and b * BLOCK < length][: SMALL.num_blocks]
            assert [b for b in blocks[row, head] if b >= 0] == sorted({*kept, *best})
            parts = np.asarray(query)[row, head * GROUP : (head + 1) * GROUP]
            parts = parts[:, sample.channels[head]]
            candidates = np.array([b * BLOCK + i for b in best for i in range(BLOCK)], int)
            scores = SCALE * parts @ labels[row, head, candidates].T
            weights = (np.exp(scores) / np.exp(scores).sum(1, keepdims=True)).sum(0)
            tokens = candidates[np.argsort(-weights)][: SMALL.token_budget]
            always = {p for p in range(length) if p // BLOCK in kept}
            chosen = [p for p in positions[row, head] if p >= 0]
            assert len(chosen) == len(set(chosen))
            assert set(chosen) == always | set(tokens)


@few
@hypothesis.given(seed=st.integers(0, 2**32 - 1), lengths=any_lengths)
def test_budgets_that_cover_everything_are_dense_attention(seed, lengths):
    """In the lagged form too, whatever the last query was and wherever a new tail begins."""
    sample = Sample(seed)
    tokens, lag = synchronous(sample.queries[0], sample.index(lengths), sample.channels, cfg=ALL)
    for step, query in enumerate(sample.queries[:3]):
        index = sample.index(np.add(lengths, step))
        if step:
            tokens, lag, _ = lagged(query, index, sample.channels, lag=lag, cfg=ALL)
        expected = dense(query, sample.key, sample.value, index.lengths)
        output = attend(query, sample.key, sample.value, tokens)
        np.testing.assert_allclose(np.asarray(output), np.asarray(expected), atol=1e-5)


@few
@hypothesis.given(seed=st.integers(0, 2**32 - 1), lengths=any_lengths)
def test_lagged_is_synchronous_while_the_query_stays(seed, lengths):
    sample = Sample(seed)
    query = sample.queries[0]
    _, lag = synchronous(query, sample.index(lengths), sample.channels, cfg=SMALL)
    index = sample.index(np.add(lengths, 1))
    tokens, _, _ = lagged(query, index, sample.channels, lag=lag, cfg=SMALL)
    chex.assert_trees_all_equal(tokens, synchronous(query, index, sample.channels, cfg=SMALL)[0])


def test_lagged_reads_the_blocks_of_the_query_before_and_tokens_by_this_one():
    sample = Sample(3)
    lengths = np.full(BATCH, LENGTH - 2)
    _, lag = synchronous(sample.queries[0], sample.index(lengths), sample.channels, cfg=SMALL)
    index = sample.index(lengths + 1)
    tokens, following, turned = lagged(
        sample.queries[1], index, sample.channels, lag=lag, cfg=SMALL
    )
    blocks = np.asarray(choose(sample.queries[0], index, index.lengths, cfg=SMALL))
    own = np.asarray(choose(sample.queries[1], index, index.lengths, cfg=SMALL))
    assert not np.array_equal(blocks, own)
    chosen = np.asarray(tokens) // BLOCK
    assert all(set(c) <= {*b, -1} for c, b in zip(chosen[0], blocks[0], strict=True))
    chex.assert_trees_all_equal(
        following.blocks, choose(sample.queries[1], index, index.lengths + 1, cfg=SMALL)
    )
    assert not turned.any()


def test_key_heads_whose_queries_turn_away_select_anew():
    """One query head of key head 1 of row 0 turns; its key head alone is given its own blocks."""
    sample = Sample(4)
    before, lengths = sample.queries[0], np.full(BATCH, LENGTH - 5)
    after = (before * 1.5).at[0, GROUP].set(-before[0, GROUP])
    _, lag = synchronous(before, sample.index(lengths), sample.channels, cfg=GUARDED)
    index = sample.index(lengths + 1)
    tokens, _, turned = lagged(after, index, sample.channels, lag=lag, cfg=GUARDED)
    np.testing.assert_array_equal(turned, [[False, True], [False, False]])
    fresh, _ = synchronous(after, index, sample.channels, cfg=GUARDED)
    stale, _, _ = lagged(after, index, sample.channels, lag=lag, cfg=SMALL)
    chex.assert_trees_all_equal(tokens, jnp.where(turned[..., None], fresh, stale))
    assert not np.array_equal(fresh[0, 1], stale[0, 1])


def test_a_guard_that_is_off_never_asks():
    query = Sample(0).queries[0]
    assert not drifted(query, -query, HEADS, -1.0).any()
    assert drifted(query, -query, HEADS, -0.99).all()
    assert not drifted(query, 3 * query, HEADS, 0.999).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tokens_that_are_not_listed_are_never_read(dtype):
    sample = Sample(5, dtype)
    lengths = np.array([LENGTH - 3, 5])
    tokens, _ = synchronous(sample.queries[0], sample.index(lengths), sample.channels, cfg=SMALL)
    listed = np.zeros((BATCH, LENGTH, HEADS, 1), bool)
    for row, head in np.ndindex(BATCH, HEADS):
        listed[row, [p for p in np.asarray(tokens)[row, head] if p >= 0], head] = True
    key, value = (jnp.where(listed, x, jnp.nan) for x in (sample.key, sample.value))
    output = attend(sample.queries[0], key, value, tokens)
    assert np.isfinite(np.asarray(output, np.float32)).all()
    chex.assert_trees_all_equal(output, attend(sample.queries[0], sample.key, sample.value, tokens))


def test_attention_to_no_token_is_zero():
    sample = Sample(0)
    none = jnp.full((BATCH, HEADS, 7), -1)
    assert not attend(sample.queries[0], sample.key, sample.value, none).any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 0),
        ("num_blocks", -1),
        ("num_channels", 3),
        ("token_budget", 13),
        ("drift_cosine", 1.5),
        ("drift_cosine", float("nan")),
    ],
)
def test_settings_that_cannot_be_are_named(field, value):
    fields = {**dataclasses.asdict(SMALL), field: value}
    with pytest.raises(ConfigError, match=rf"config\.async_tls\.{field} = {value}: must be"):
        AsyncTLSConfig(**fields)
