"""The chunked loss against plain cross entropy, and its memory."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from absl.testing import parameterized

from asa_jax.training.losses import summed_nll


def _inputs(rows: int, length: int, features: int, vocab: int, dtype: str = "float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (rows, length, features), dtype)
    unembedding = jax.random.normal(keys[1], (features, vocab), dtype)
    targets = jax.random.randint(keys[2], (rows, length), 0, vocab)
    counted = jax.random.bernoulli(keys[3], 0.8, (rows, length))
    return hidden, unembedding, targets, counted


def _plain_nll(hidden, unembedding, targets, counted, _chunk):
    logits = jnp.einsum("BTD,DV->BTV", hidden, unembedding, preferred_element_type=jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(nll, where=counted)


def _value_and_gradients(nll, hidden, unembedding, targets, counted, chunk):
    """Of some multiple of the sum, which the gradients have to be multiplied by."""

    def loss(hidden, unembedding):
        return nll(hidden, unembedding, targets, counted, chunk) / 7

    return jax.value_and_grad(loss, argnums=(0, 1))(hidden, unembedding)


class SummedNllTest(parameterized.TestCase):
    @parameterized.parameters(1, 8, 1000)
    def test_equals_plain_cross_entropy(self, chunk_tokens):
        inputs = _inputs(2, 13, 5, 7)
        chex.assert_trees_all_close(
            summed_nll(*inputs, chunk_tokens), _plain_nll(*inputs, None), rtol=1e-5
        )
        chex.assert_trees_all_close(
            _value_and_gradients(summed_nll, *inputs, chunk_tokens),
            _value_and_gradients(_plain_nll, *inputs, None),
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip

    def test_large_logits_stay_finite(self):
        hidden, unembedding, targets, counted = _inputs(1, 8, 4, 6)
        result = _value_and_gradients(summed_nll, 1e4 * hidden, unembedding, targets, counted, 4)
        chex.assert_tree_all_finite(result)

    def test_bfloat16_gradient_of_the_unembedding_accumulates_in_float32(self):
        """Many chunks may lose no more than the plain bfloat16 gradient loses."""
        inputs = _inputs(1, 512, 8, 16, "bfloat16")
        exact = _value_and_gradients(
            _plain_nll, *(x.astype("float32") for x in inputs[:2]), *inputs[2:], None
        )[1][1]
        errors = [
            jnp.max(jnp.abs(_value_and_gradients(nll, *inputs, 4)[1][1] - exact))
            for nll in (summed_nll, _plain_nll)
        ]
        self.assertLessEqual(errors[0], 2 * errors[1])


@pytest.mark.parametrize("context_tokens", [65536])
def test_memory_of_a_long_sequence_and_a_large_vocabulary(context_tokens):
    """65,536 tokens and 32,000 words: all logits in float32 would be 7.8 GiB."""
    hidden, unembedding, targets, counted = jax.eval_shape(
        lambda: _inputs(1, context_tokens, 64, 32000, "bfloat16")
    )
    compiled = (
        jax.jit(lambda *args: _value_and_gradients(summed_nll, *args, 2048))
        .lower(hidden, unembedding, targets, counted)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30
