"""Full attention in chunks of queries against all of it at once."""

from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from asa_jax.model import causal_attention
from tests.model import naive_attention


def _inputs(length: int) -> tuple[np.ndarray, ...]:
    """Queries of 4 heads, keys and narrower values of 2; two documents with padding between."""
    rng = np.random.default_rng(0)
    shapes = ((1, length, 4, 8), (1, length, 2, 8), (1, length, 2, 5))
    segment_ids = np.ones((1, length), np.int32)
    segment_ids[:, length // 3 :], segment_ids[:, length // 3 - 2 : length // 3] = 2, 0
    return *(rng.normal(size=shape).astype(np.float32) for shape in shapes), segment_ids


class CausalAttentionTest(parameterized.TestCase):
    @parameterized.parameters(15, 16, 17, 40)
    def test_chunks_of_queries(self, length):
        """Values and gradients; 40 tokens are two and a half chunks of 16."""
        whole = _outputs_and_gradients(*_inputs(length))
        with mock.patch.object(causal_attention, "QUERY_CHUNK", 16):
            chunked = _outputs_and_gradients(*_inputs(length))
        chex.assert_trees_all_close(chunked, whole, rtol=1e-5, atol=1e-6)

    @parameterized.parameters(None, 0.3)
    def test_equals_the_definition(self, scale):
        query, key, value, segment_ids = _inputs(40)
        output = causal_attention.causal_attention(query, key, value, segment_ids, scale)
        same = (segment_ids[0][:, None] == segment_ids[0]) & (segment_ids[0] > 0)
        expected, _ = naive_attention.attend(
            query[0], key[0], value[0], same & naive_attention.causal(40), scale or 8**-0.5
        )
        chex.assert_trees_all_close(np.asarray(output[0]), expected, atol=1e-5)


def _outputs_and_gradients(query, key, value, segment_ids):
    @jax.jit
    def run(*qkv):
        def loss(*qkv):
            output = causal_attention.causal_attention(*qkv, segment_ids)
            return jnp.sum(jnp.sin(output)), output

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)

    return run(query, key, value)
