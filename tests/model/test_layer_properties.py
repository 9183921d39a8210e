"""What holds for every kind of attention layer, whatever its equations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from asa_jax.config_model import LAYER_KINDS
from tests.model.layer_cases import NAMES, SPARSE, LayerCase, inputs, layer_case, one_document, run

# One shape for all tests, so that a layer is compiled once. Seven whole blocks and a part of one:
# every list of selected blocks leaves something out.
BATCH, LENGTH = 18, 118
# (start, length) of documents packed in a row, with padding between and behind them.
DOCUMENTS = ((0, 70), (80, 22), (112, 5))


class LayerPropertiesTest(parameterized.TestCase):
    @parameterized.named_parameters(zip(NAMES, NAMES, strict=True))
    def test_keeps_shape_and_dtype(self, name):
        case = layer_case(name)
        for dtype in ("float32", "bfloat16"):
            x = jax.ShapeDtypeStruct((2, LENGTH, case.cfg.hidden_size), dtype)
            ids = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
            output = jax.eval_shape(case.apply, case.params, x, ids, ids)
            chex.assert_trees_all_equal_shapes_and_dtypes(output, x)

    @parameterized.named_parameters(zip(NAMES, NAMES, strict=True))
    def test_no_token_sees_the_future(self, name):
        """Row i > 0 differs from row 0 from token 96 + i on: all offsets in a block and a group."""
        case = layer_case(name)
        x = inputs(case, BATCH, LENGTH)
        changed = np.arange(LENGTH) >= 96 + np.arange(1, BATCH)[:, None]
        x[1:] = np.where(changed[..., None], x[1:], x[0])
        outputs = run(case, x)
        difference = np.abs(outputs[1:] - outputs[0]).max(-1)
        chex.assert_trees_all_close(difference[~changed], np.zeros(np.sum(~changed)), atol=1e-5)
        self.assertGreater(difference[changed].min(), 1e-3)

    @parameterized.named_parameters(zip(NAMES, NAMES, strict=True))
    def test_packed_documents_equal_separate_runs(self, name):
        """Row 0 packs the documents, row 1 too but pads otherwise; later rows hold one each."""
        case = layer_case(name)
        x = inputs(case, BATCH, LENGTH)
        segment_ids, positions = np.zeros((2, BATCH, LENGTH), np.int32)
        x[1] = x[0]
        for i, (start, length) in enumerate(DOCUMENTS):
            segment_ids[:2, start : start + length] = i + 1
            segment_ids[i + 2, :length] = 1
            positions[:2, start : start + length] = np.arange(length)
            positions[i + 2, :length] = np.arange(length)
            x[i + 2, :length] = x[0, start : start + length]
        x[1][segment_ids[1] == 0] += 5
        outputs = case.apply(case.params, x, positions, segment_ids)
        chex.assert_tree_all_finite(outputs)
        for i, (start, length) in enumerate(DOCUMENTS):
            separate = outputs[i + 2, :length]
            for row in range(2):
                packed = outputs[row, start : start + length]
                chex.assert_trees_all_close(packed, separate, atol=1e-5)

    @parameterized.parameters(
        *((name, 18) for name in NAMES), *((kind, 1) for kind in LAYER_KINDS), ("nsa_paper", 1)
    )
    def test_any_length(self, name, length):
        case = layer_case(name)
        x = inputs(case, BATCH, LENGTH)
        chex.assert_trees_all_close(
            run(case, x[:1, :length])[0], run(case, x)[0, :length], atol=1e-5
        )

    @parameterized.named_parameters(zip(NAMES, NAMES, strict=True))
    def test_gradients_are_finite_and_reach_every_weight(self, name):
        """Rows: one document, a document shorter than a block, padding alone."""
        case = layer_case(name)
        positions, _ = one_document(3, LENGTH)
        segment_ids = (positions < np.array([[LENGTH], [7], [0]])).astype(np.int32)
        by_params, by_x = _gradients(case, inputs(case, 3, LENGTH), positions, segment_ids)
        chex.assert_tree_all_finite((by_params, by_x))
        for path, leaf in jax.tree_util.tree_leaves_with_path(by_params):
            self.assertTrue(np.all(leaf != 0), jax.tree_util.keystr(path))
        chex.assert_trees_all_equal(by_x[2], jnp.zeros_like(by_x[2]))


class FirstBlockTest(parameterized.TestCase):
    """Until a compression block is complete its branch adds nothing."""

    @parameterized.parameters(*(name for name in SPARSE if name != "nsa_window_only"))
    def test_compressed_branch_is_zero_before_a_block_is_complete(self, name):
        """The gate of the compressed branch, gate 0, matters from that token on."""
        case = layer_case(name)
        first = case.cfg.compression_block_size - 1
        x = inputs(case, BATCH, LENGTH)
        gates = case.params["gates"]["weight"].copy()
        gates[..., 0] += 1
        changed = case._replace(params={**case.params, "gates": {"weight": gates}})
        difference = np.abs(run(case, x) - run(changed, x)).max(-1)
        chex.assert_trees_all_equal(difference[:, :first], np.zeros((BATCH, first)))
        self.assertGreater(difference[:, first].min(), 1e-4)

    @parameterized.parameters("global", "nsa")
    def test_gradients_without_any_block_are_finite(self, name):
        """A row of 7 tokens: there is not one compressed key."""
        case = layer_case(name)
        gradients = _gradients(case, inputs(case, 1, 7), *one_document(1, 7))
        chex.assert_tree_all_finite(gradients)


def _gradients(case: LayerCase, x, positions, segment_ids):
    def loss(params, x):
        return jnp.sum(jnp.sin(case.apply(params, x, positions, segment_ids)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(case.params, x)
