"""Rotary embedding, normalisation and token embedding."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import strategies as st

from asa_jax.model.layers import RMSNorm, TokenEmbedding
from asa_jax.model.rope import rotate
from tests.model import naive_attention
from tests.models import tiny_model_config

positions = st.integers(0, 2**16)


def _heads(seed: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, 1, 3, 8)).astype(dtype)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(query=positions, key=positions, shift=st.integers(0, 2**12))
def test_scores_depend_on_the_distance_alone(query, key, shift):
    def score(query, key):
        return np.sum(_rotated(_heads(0), query) * _rotated(_heads(1), key), axis=-1)

    chex.assert_trees_all_close(score(query, key), score(query + shift, key + shift), atol=0.05)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(position=positions)
def test_rotation_keeps_the_length(position):
    lengths = [np.linalg.norm(x, axis=-1) for x in (_heads(0), _rotated(_heads(0), position))]
    chex.assert_trees_all_close(*lengths, rtol=1e-5)


def _rotated(x: np.ndarray, position: int) -> np.ndarray:
    return np.asarray(rotate(x, jnp.array([[position]]), 1e4))


def test_bfloat16_is_rotated_in_float32():
    """Angles of bfloat16 would be wrong by whole turns at position 50,000."""
    x, position = jnp.asarray(_heads(0), "bfloat16"), jnp.array([[50_001]])
    exact = rotate(x.astype("float32"), position, 1e4)
    chex.assert_trees_all_equal(rotate(x, position, 1e4), exact.astype("bfloat16"))


def test_rms_norm():
    norm = RMSNorm(8, 1e-2)
    norm.scale[...] = jnp.arange(8.0)
    x = 0.1 * _heads(0)
    chex.assert_trees_all_close(
        np.asarray(norm(x)), naive_attention.rms_norm(x, np.arange(8.0), 1e-2), rtol=1e-5
    )


def test_bfloat16_is_normalised_in_float32():
    x = jnp.asarray(_heads(0), "bfloat16")
    norm = RMSNorm(8, 1e-6)
    chex.assert_trees_all_equal(norm(x), norm(x.astype("float32")).astype("bfloat16"))


def test_gradient_of_a_frequent_token_is_summed_in_full():
    """4,096 ones, of which a sum in bfloat16 would keep 256."""
    cfg = tiny_model_config(("full",), compute_dtype="bfloat16")
    graphdef, state = nnx.split(TokenEmbedding(cfg, rngs=nnx.Rngs(0)))
    tokens = jnp.full((1, 4096), 3).at[0, 0].set(5)

    @jax.jit
    @jax.grad
    def gradient(state):
        return nnx.merge(graphdef, state)(tokens).astype(jnp.float32).sum()

    table = gradient(state)["table"][...]
    chex.assert_trees_all_close(table[3], np.full(cfg.hidden_size, 4095.0), rtol=4e-3)
    chex.assert_trees_all_close(table[5], np.ones(cfg.hidden_size))
    chex.assert_trees_all_close(table[4], np.zeros(cfg.hidden_size))
