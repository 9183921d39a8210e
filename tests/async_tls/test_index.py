"""Bounds of blocks and labels of tokens."""

import chex
import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from asa_jax.async_tls.index import append, init_index
from asa_jax.async_tls.labels import dequantise, make_labels, take_channels
from pallas_kernels.async_tls_select_blocks.reference import block_scores
from pallas_kernels.async_tls_select_tokens.reference import label_scores
from tests.async_tls.cases import jit

BLOCK, LENGTH, HEADS, GROUP, DIM, CHANNELS = 4, 24, 2, 3, 6, 4
SHAPE = (2, LENGTH, HEADS, DIM)
jitted_append = jit(append)
jitted_scores = jit(block_scores)
jitted_labels = jit(make_labels)
jitted_dequantise = jit(dequantise)


def channels_of(rng):
    return jnp.asarray(np.stack([rng.permutation(DIM)[:CHANNELS] for _ in range(HEADS)]), jnp.int32)


def empty(dtype=jnp.float32):
    return init_index(2, LENGTH, HEADS, DIM, num_channels=CHANNELS, block_size=BLOCK, dtype=dtype)


def true_maxima(query, key, lengths):
    """Greatest q . k of each block in float64: [B, K, G, C]; -inf where no token is."""
    query, key = (np.asarray(x.astype(jnp.float32), np.float64) for x in (query, key))
    grouped = query.reshape(2, HEADS, GROUP, DIM)
    scores = np.einsum("BKGH,BSKH->BKGS", grouped, key)
    scores[
        np.broadcast_to(np.arange(LENGTH) >= lengths[:, None, None, None], scores.shape)
    ] = -np.inf
    return scores.reshape(*scores.shape[:3], -1, BLOCK).max(-1)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    integers=st.booleans(),
    lengths=st.tuples(st.integers(1, LENGTH), st.integers(1, LENGTH)),
)
def test_no_score_is_above_the_bound_of_its_block(seed, dtype, integers, lengths):
    """Of integers nothing is rounded; of others the sum in float32 is, by what the module says."""
    rng, lengths = np.random.default_rng(seed), np.array(lengths)
    key, query = (
        np.round(20 * x) if integers else x * 10 ** rng.uniform(-3, 3, DIM)
        for x in (rng.normal(size=SHAPE), rng.normal(size=(2, HEADS * GROUP, DIM)))
    )
    key, query = jnp.asarray(key, dtype), jnp.asarray(query, dtype)
    index = jitted_append(empty(dtype), key, channels_of(rng), jnp.asarray(lengths))
    bounds = np.asarray(jitted_scores(query, index.bounds), np.float64)
    maxima = true_maxima(query, key, lengths)
    reach = np.abs(np.asarray(key, np.float64)).max(1)  # [B, K, H]
    magnitude = np.abs(np.asarray(query, np.float64)).reshape(2, HEADS, GROUP, DIM)
    rounding = 2 * DIM * 2.0**-24 * np.einsum("BKGH,BKH->BKG", magnitude, reach)
    slack = np.zeros_like(rounding) if integers else rounding
    assert np.all(bounds >= maxima - slack[..., None])
    # Blocks without tokens are below all others, whatever the query.
    assert np.all(bounds[maxima == -np.inf] < -1e30)


def test_the_bound_of_one_token_is_its_score():
    rng = np.random.default_rng(0)
    key, query = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (SHAPE, (2, 6, DIM)))
    index = jitted_append(empty(), key[:, :1], channels_of(rng))
    scores = np.asarray(jitted_scores(query, index.bounds))[..., 0]
    expected = np.einsum("BKGH,BKH->BKG", query.reshape(2, HEADS, GROUP, DIM), key[:, 0])
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    pieces=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5),
)
def test_appending_piece_by_piece_is_appending_at_once(seed, pieces):
    rng = np.random.default_rng(seed)
    key = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    channels, index, lengths = channels_of(rng), empty(), np.zeros(2, int)
    for counts in pieces:
        counts = np.minimum(counts, LENGTH - lengths)
        piece = np.stack(
            [np.resize(row[start : start + 5], (5, HEADS, DIM)) for row, start in
             zip(np.pad(key, ((0, 0), (0, 5), (0, 0), (0, 0))), lengths, strict=True)]
        )  # fmt: skip
        index = jitted_append(index, jnp.asarray(piece), channels, jnp.asarray(counts, jnp.int32))
        lengths += counts
    at_once = jitted_append(empty(), key, channels, jnp.asarray(lengths, jnp.int32))
    chex.assert_trees_all_equal(index, at_once)


def test_one_token_a_step_fills_the_whole_index_and_no_more():
    rng = np.random.default_rng(0)
    key = jnp.asarray(rng.normal(size=SHAPE), jnp.bfloat16)
    channels, index = channels_of(rng), empty(jnp.bfloat16)
    for position in range(LENGTH):
        index = jitted_append(index, key[:, position : position + 1], channels)
    chex.assert_trees_all_equal(index, jitted_append(empty(jnp.bfloat16), key, channels))
    full = jitted_append(index, key[:, :1], channels)
    chex.assert_trees_all_equal(full, index)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-6, 4),
    offset=st.floats(-100, 100),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_a_label_is_off_by_half_a_step_at_most(seed, exponent, offset, dtype):
    rng = np.random.default_rng(seed)
    key = jnp.asarray(offset + 10**exponent * rng.normal(size=(5, HEADS, DIM)), dtype)
    hypothesis.assume(np.abs(np.asarray(key, np.float32)).max() < 65504)
    channels = channels_of(rng)
    labels = jitted_labels(key, channels)
    true = np.asarray(take_channels(key, channels), np.float32)
    error = np.abs(np.asarray(jitted_dequantise(labels)) - true)
    step = np.asarray(labels.step, np.float32)[..., None]
    assert np.all(error <= step / 2 + 4 * 2.0**-24 * np.abs(true).max())
    # Rounding to float16 widens the step by little more than its own precision.
    spread = (true.max(-1) - true.min(-1))[..., None]
    assert np.all(step <= (spread + 2.0**-10 * np.abs(true).max()) / 15 * (1 + 2.0**-9) + 2.0**-14)


def test_equal_channels_are_kept_within_the_precision_of_float16():
    labels = jitted_labels(jnp.full((HEADS, DIM), 3.3), jnp.zeros((HEADS, 2), jnp.int32))
    np.testing.assert_allclose(np.asarray(jitted_dequantise(labels)), 3.3, atol=2.0**-13)


def test_scores_of_packed_labels_are_those_of_dequantised_ones():
    rng = np.random.default_rng(1)
    key = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    query = jnp.asarray(rng.normal(size=(2, HEADS, GROUP, CHANNELS)), jnp.float32)
    labels = jitted_append(empty(), key, channels_of(rng)).labels
    expected = np.einsum("BKGR,BKSR->BKGS", query, dequantise(labels))
    np.testing.assert_allclose(np.asarray(label_scores(query, labels)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_length": 10}, "max_length: 10 is no multiple of block_size 4"),
        ({"num_channels": 3}, "num_channels: 3 is odd"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    given = {"max_length": LENGTH, "num_channels": CHANNELS, **sizes}
    with pytest.raises(ValueError, match=message):
        init_index(
            1, given["max_length"], HEADS, DIM,
            num_channels=given["num_channels"], block_size=BLOCK, dtype=jnp.float32,
        )  # fmt: skip
