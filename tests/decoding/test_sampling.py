"""Sampling against counts and sets computed by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from asa_jax.decoding.sampling import penalise, sample_tokens, truncate
from asa_jax.decoding.settings import Sampling, check_request, row_seeds
from asa_jax.errors import ConfigError

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.25, 0.2]]))
SEEN = jnp.array([True, True, False, False, False])
NUM_DRAWS = 20_000


def _draw(sampling: Sampling, logits: jax.Array = LOGITS, seed: int = 0) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), NUM_DRAWS)
    rows = jnp.broadcast_to(logits, (NUM_DRAWS, logits.shape[-1]))
    seen = jnp.broadcast_to(SEEN, rows.shape)
    return np.asarray(jax.jit(sample_tokens)(rows, seen, keys, sampling.checked()))


def _kept(logits: jax.Array, top_k: int, top_p: float) -> list[set[int]]:
    truncated = np.asarray(jax.jit(truncate)(logits, top_k, top_p))
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in truncated]


class SamplingTest(parameterized.TestCase):
    @parameterized.parameters(
        (Sampling(1.0, 0, 1.0), [0.1, 0.4, 0.05, 0.25, 0.2]),
        # p^(1/T), normalised
        (Sampling(0.5, 0, 1.0), [0.01, 0.16, 0.0025, 0.0625, 0.04]),
        (Sampling(2.0, 0, 1.0), [0.1**0.5, 0.4**0.5, 0.05**0.5, 0.25**0.5, 0.2**0.5]),
        (Sampling(1.0, 2, 1.0), [0, 0.4, 0, 0.25, 0]),
        (Sampling(1.0, 0, 0.7), [0, 0.4, 0, 0.25, 0.2]),
        # 0.4 is 0.62 of the two that top-k leaves, so top-p needs no other.
        (Sampling(1.0, 2, 0.6), [0, 1, 0, 0, 0]),
        # At this temperature the three largest hold 0.94.
        (Sampling(0.5, 0, 0.94), [0, 0.16, 0, 0.0625, 0.04]),
        (Sampling(min_p=0.45), [0, 0.4, 0, 0.25, 0.2]),
        (Sampling(min_p=1), [0, 1, 0, 0, 0]),
        # After the temperature 0.0625 / 0.16 is too little.
        (Sampling(0.5, min_p=0.45), [0, 0.16, 0, 0, 0]),
        (Sampling(1.0, 3, 0.7, 0.6), [0, 0.4, 0, 0.25, 0]),
        # Logarithms of the two that were seen, which are negative, are doubled.
        (Sampling(repetition_penalty=2), [0.01, 0.16, 0.05, 0.25, 0.2]),
        (Sampling(repetition_penalty=2, top_k=3), [0, 0.16, 0, 0.25, 0.2]),
    )
    def test_frequencies(self, sampling, weights):
        want = np.array(weights) / np.sum(weights)
        counts = np.bincount(_draw(sampling), minlength=5)
        deviation = np.sqrt(NUM_DRAWS * want * (1 - want))
        self.assertTrue(np.all(np.abs(counts - NUM_DRAWS * want) <= 4.5 * deviation), counts)

    @parameterized.parameters(0.0, 1e-30)
    def test_no_temperature_takes_the_largest(self, temperature):
        logits = jnp.array([[1.0, 3.0, 2.0], [1e4, -1e4, 1e4 + 1]])
        keys = jax.random.split(jax.random.key(0), 2)
        seen = jnp.zeros_like(logits, bool)
        drawn = sample_tokens(logits, seen, keys, Sampling(temperature, 2, 0.5))
        chex.assert_trees_all_equal(drawn, jnp.array([1, 2], jnp.int32))

    def test_seed_decides(self):
        first, again, other = (_draw(Sampling(), seed=seed) for seed in (1, 1, 2))
        chex.assert_trees_all_equal(first, again)
        self.assertGreater(np.mean(first != other), 0.5)

    def test_row_depends_on_its_own_key(self):
        keys = jax.random.split(jax.random.key(0), 3)
        logits = jax.random.normal(jax.random.key(1), (3, 50))
        order = jnp.array([2, 0, 1])
        seen = logits > 1
        drawing = jax.jit(sample_tokens)
        settings = Sampling(repetition_penalty=2.0)
        drawn = drawing(logits, seen, keys, settings)
        reordered = drawing(logits[order], seen[order], keys[order], settings)
        chex.assert_trees_all_equal(reordered, drawn[order])

    def test_settings_do_not_recompile(self):
        drawing = jax.jit(chex.assert_max_traces(sample_tokens, n=1))
        keys = jax.random.split(jax.random.key(0), 1)
        for sampling in (Sampling(0), Sampling(1.5, 3), Sampling(0.5, 0, 0.9, 0.1, 1.5)):
            drawing(LOGITS, SEEN[None], keys, sampling.checked())

    def test_ties_go_to_lower_ids(self):
        self.assertEqual(_kept(jnp.zeros((2, 6)), 4, 0.5), [{0, 1}] * 2)
        self.assertEqual(_kept(jnp.zeros((1, 6)), 4, 1.0), [{0, 1, 2, 3}])

    def test_tokens_that_cannot_be_drawn_stay_so(self):
        logits = LOGITS.at[0, 1].set(-jnp.inf)
        self.assertEqual(_kept(logits, 2, 1.0), [{3, 4}])
        self.assertNotIn(1, _draw(Sampling(5.0), logits))

    def test_the_least_and_the_most_that_settings_may_be(self):
        rows = jnp.array([[0.0, 60.0, -60.0, 20.0, -jnp.inf]])
        for least in (Sampling(1e-30), Sampling(top_p=1e-30), Sampling(min_p=1.0)):
            self.assertEqual(set(_draw(least, rows).tolist()), {1})
        self.assertEqual(set(_draw(Sampling(1e30), rows).tolist()), {0, 1, 2, 3})
        # Tokens 0 and 1 are seen.
        self.assertEqual(set(_draw(Sampling(0, repetition_penalty=1e30), rows).tolist()), {3})
        self.assertEqual(set(_draw(Sampling(0, repetition_penalty=1e-30), rows).tolist()), {1})

    @parameterized.parameters(
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        # Infinite or 0 in float32.
        ({"temperature": 1e39}, "temperature = 1e"),
        ({"temperature": 1e-46}, "temperature = 1e-46"),
        ({"top_p": 1e-46}, "top_p = 1e-46"),
        ({"repetition_penalty": 1e39}, "repetition_penalty = 1e"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty = 1e-46"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.01}, "top_p = 1.01"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"min_p": 1.1}, "min_p = 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
    )
    def test_out_of_range(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            Sampling(**fields).checked()

    @parameterized.parameters(
        ((0,), "max_tokens = 0"),
        ((1, [-1]), "seed = -1"),
        ((1, [0, 2**32]), "seed = 4294967296"),
        ((1, [0], [""]), "stop = ''"),
        ((1, [0], [], 21), "alternatives = 21"),
    )
    def test_request_out_of_range(self, request, message):
        with pytest.raises(ConfigError, match=message):
            check_request(*request)

    def test_penalty_makes_seen_tokens_less_likely(self):
        logits = jnp.array([[2.0, -2.0, 1.5, -1.0]])
        got = penalise(logits, jnp.array([[True, True, False, False]]), 2.0)
        chex.assert_trees_all_equal(got, jnp.array([[1.0, -4.0, 1.5, -1.0]]))

    def test_seeds_of_rows(self):
        self.assertEqual(row_seeds(7, 3), [7, 8, 9])
        self.assertEqual(row_seeds([4, 4], 2), [4, 4])
        self.assertEqual(row_seeds(2**32 - 1, 2), [2**32 - 1, 0])
        with pytest.raises(ConfigError, match="one for each of 3 prompts"):
            row_seeds([1, 2], 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 14), st.floats(1e-3, 1))
def test_support_is_the_fewest_of_the_most_likely(seed, top_k, top_p):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal(12).astype(np.float32)
    order = np.argsort(-logits)[: top_k or 12]
    weights = np.exp(logits[order].astype(np.float64))
    held = np.cumsum(weights / weights.sum())
    enough = 1 + int(np.sum(held < top_p))
    (kept,) = _kept(jnp.array(logits[None]), top_k, top_p)
    # A sum that meets top_p to rounding may fall either way.
    candidates = [enough + shift for shift in (-1, 0, 1) if 1 <= enough + shift <= len(order)]
    if np.min(np.abs(held[:-1] - top_p), initial=1) > 1e-6:
        candidates = [min(enough, len(order))]
    assert kept in [set(order[:count].tolist()) for count in candidates]
