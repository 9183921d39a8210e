"""Gradients of whole layers, by every weight and by the input.

Windowed and sparse layers are compared with finite differences in float64. The softmax of the
library's full attention is in float32, too coarse for that; it is compared with the gradients of a
window that holds everything.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax.test_util import check_grads

from tests.model.layer_cases import LayerCase, inputs, layer_case, make_case, one_document

LENGTH = 86


class GradientsTest(parameterized.TestCase):
    @parameterized.parameters("local", "global", "nsa", "nsa_shared", "nsa_paper")
    def test_equal_finite_differences(self, name):
        """The choice of blocks does not change within the difference."""
        case = layer_case(name)
        x = inputs(case, 1, LENGTH).astype(np.float64)
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), case.params)
        with jax.enable_x64(True):
            check_grads(
                jax.jit(lambda params, x: _outputs(case, params, x)), (params, x),
                order=1, modes=["rev"], eps=1e-5, atol=1e-6, rtol=1e-6,
            )  # fmt: skip

    @parameterized.parameters(("full", "sliding"), ("mla", "local"))
    def test_full_attention_equals_a_window_that_holds_all(self, kind, windowed_kind):
        full, windowed = (make_case(k, window_size=LENGTH) for k in (kind, windowed_kind))
        chex.assert_trees_all_close(_gradients(full), _gradients(windowed), rtol=1e-4, atol=1e-4)


def _outputs(case: LayerCase, params, x):
    """The layer's outputs, bent, for a row of two documents and padding."""
    positions, segment_ids = one_document(1, LENGTH)
    segment_ids[:, 64:], positions[:, 64:] = 2, positions[:, 64:] - 64
    segment_ids[:, 80:] = 0
    return jnp.sin(case.apply(params, x, positions, segment_ids))


def _gradients(case: LayerCase):
    def loss(params, x):
        return jnp.sum(_outputs(case, params, x))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(case.params, inputs(case, 1, LENGTH))
