"""The whole model: scan, rematerialisation, precision, parameters and their logical axes."""

import dataclasses
import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import nnx

from asa_jax.model.param_layout import listed_layers, matrices_in_compute_dtype, shortest_period
from asa_jax.model.transformer import abstract_model, count_params, init_params
from pallas_kernels import dispatch
from tests.model.layer_cases import one_document
from tests.models import random_params, tiny_model_config

ASA = ("local", "global") * 2
BATCH, LENGTH = 2, 40


@functools.cache
def _config(**overrides):
    return tiny_model_config(ASA, **overrides)


@functools.cache
def _params(cfg):
    """Weights; those of a model with scan are the stacked ones of the model without."""
    if cfg.scan_layers:
        return _stack(_params(dataclasses.replace(cfg, scan_layers=False)))
    return random_params(cfg)


def _batch(cfg, length=LENGTH):
    tokens = np.random.default_rng(0).integers(cfg.vocab_size, size=(BATCH, length))
    return (tokens.astype(np.int32), *one_document(BATCH, length))


def _logits(cfg, params, batch):
    model = nnx.merge(abstract_model(cfg)[0], params)
    hidden = model(*batch)
    return jnp.einsum("BTD,DV->BTV", hidden, model.unembedding()).astype(jnp.float32)


def _loss(cfg, params, batch):
    log_probabilities = jax.nn.log_softmax(_logits(cfg, params, batch))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, batch[0][..., None], axis=-1))


@functools.cache
def _jitted_logits(cfg):
    return jax.jit(functools.partial(_logits, cfg))


@functools.cache
def _loss_and_gradients(cfg):
    return jax.jit(jax.value_and_grad(functools.partial(_loss, cfg)))(_params(cfg), _batch(cfg))


def _stack(params):
    """Parameters of a model without scan as those of one with scan."""
    groups = [params["groups"][i] for i in range(len(params["groups"]))]
    return {**params, "groups": jax.tree.map(lambda *leaves: np.stack(leaves), *groups)}


class ScanAndRematTest(parameterized.TestCase):
    @parameterized.parameters("none", "dots", "attention", "full")
    def test_scanned_and_rematerialised_layers_give_the_same_loss_and_gradients(self, remat):
        loss, gradients = _loss_and_gradients(_config())
        cfg = _config(scan_layers=True, remat=remat)
        result = _loss_and_gradients(cfg)
        chex.assert_trees_all_close(result, (loss, _stack(gradients)), rtol=1e-4, atol=1e-6)

    def test_listed_layers_are_those_of_the_stack(self):
        cfg = _config(scan_layers=True, remat="full")
        listed_cfg, listed = listed_layers(cfg, _params(cfg))
        self.assertEqual(listed_cfg, _config(remat="full"))
        chex.assert_trees_all_equal(listed, _params(_config()))
        self.assertIs(listed_layers(listed_cfg, listed)[1], listed)

    def test_matrices_may_be_cast_before_they_are_used(self):
        """With experts, whose router keeps float32."""
        experts = {"num_experts": 4, "num_experts_per_token": 2, "expert_size": 8}
        cfg = _config(compute_dtype="bfloat16")
        cfg = dataclasses.replace(cfg, experts=dataclasses.replace(cfg.experts, **experts))
        params = _params(cfg)
        cast = matrices_in_compute_dtype(cfg, params)
        self.assertEqual(_loss(cfg, cast, _batch(cfg)), _loss(cfg, params, _batch(cfg)))
        sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (cast, params)]
        self.assertBetween(sizes[0] / sizes[1], 0.5, 0.53)

    def test_rematerialisation_keeps_less(self):
        """What the backward pass holds: everything, matmul results, layer inputs."""
        held = {}
        for remat in ("none", "dots", "attention", "full"):
            cfg = _config(remat=remat)
            _, residuals = jax.eval_shape(
                lambda params, cfg=cfg: jax.vjp(lambda p: _loss(cfg, p, _batch(cfg)), params),
                _params(cfg),
            )
            held[remat] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
        self.assertLess(held["dots"], held["none"])
        self.assertLess(held["attention"], held["dots"])
        self.assertLess(held["full"], held["attention"])

    def test_kept_attention_is_not_computed_again(self):
        """The kernels of a training step, all of them in one local and one global layer."""
        sizes = {
            "num_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
            "v_head_dim": 64, "group_kv_lora_rank": 64, "compression_block_size": 16,
            "compression_stride": 16, "selection_block_size": 16, "compute_dtype": "bfloat16",
        }  # fmt: skip
        calls = {}
        for remat in ("attention", "full"):
            cfg = tiny_model_config(ASA[:2], remat=remat, scan_layers=True, **sizes)
            gradient = jax.jit(jax.grad(functools.partial(_loss, cfg)))
            with mock.patch.object(dispatch, "is_hopper", lambda: True):
                traced = gradient.trace(abstract_model(cfg)[1], _batch(cfg, 128))
                text = traced.lower(lowering_platforms=("cuda",)).as_text()
            calls[remat] = text.count("custom_call @mosaic_gpu")
        # Of a window, of compressed and selected blocks, and two of the choice of blocks.
        self.assertEqual(calls["full"] - calls["attention"], 5)

    def test_scan_traces_a_layer_group_once(self):
        """With scan, twelve layers are as long a program as four; without, they add calls alone."""

        def program(cfg):
            params = abstract_model(cfg)[1]
            lowered = jax.jit(functools.partial(_loss, cfg)).lower(params, _batch(cfg))
            return len(lowered.as_text().splitlines())

        sizes = {
            (layers, scan): program(
                tiny_model_config(("local", "global") * (layers // 2), scan_layers=scan)
            )
            for layers in (4, 12)
            for scan in (False, True)
        }
        self.assertEqual(sizes[4, True], sizes[12, True])
        self.assertLess(sizes[12, False], 2 * sizes[4, False])


class ModelTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_hidden_states(self):
        cfg = tiny_model_config(("full",))
        graphdef = abstract_model(cfg)[0]
        hidden = self.variant(lambda params, batch: nnx.merge(graphdef, params)(*batch))(
            _params(cfg), _batch(cfg)
        )
        chex.assert_shape(hidden, (BATCH, LENGTH, cfg.hidden_size))
        # The final norm: unit mean square, times a scale.
        scale = _params(cfg)["final_norm"]["scale"]
        mean_square = np.mean((hidden / scale) ** 2, axis=-1)
        chex.assert_trees_all_close(mean_square, np.ones((BATCH, LENGTH)), rtol=1e-3)

    def test_traced_once(self):
        cfg = _config(scan_layers=True)
        chex.clear_trace_counter()

        @jax.jit
        @chex.assert_max_traces(n=1)
        def loss(params, batch):
            return _loss(cfg, params, batch)

        params, (tokens, positions, segment_ids) = _params(cfg), _batch(cfg)
        losses = [loss(params, (tokens[::step], positions, segment_ids)) for step in (1, -1)]
        losses.append(loss(jax.tree.map(lambda p: p + 1e-2, params), _batch(cfg)))
        self.assertNotAlmostEqual(float(losses[0]), float(losses[2]))
        with self.assertRaisesRegex(AssertionError, "traced"):
            loss(params, _batch(cfg, LENGTH + 1))

    def test_no_token_sees_the_future(self):
        cfg = _config(scan_layers=True)
        logits = _jitted_logits(cfg)
        tokens, positions, segment_ids = _batch(cfg)
        other = np.where(positions < 21, tokens, (tokens + 1) % cfg.vocab_size)
        outputs = [
            np.asarray(logits(_params(cfg), (t, positions, segment_ids))) for t in (tokens, other)
        ]
        chex.assert_trees_all_close(outputs[0][:, :21], outputs[1][:, :21], atol=1e-4)
        self.assertGreater(np.abs(outputs[0] - outputs[1])[:, 21:].max(-1).min(), 1e-2)

    def test_bfloat16_is_close_to_float32(self):
        """Parameters stay float32; their gradients arrive in float32."""
        cfg = _config(scan_layers=True)
        half = _config(scan_layers=True, compute_dtype="bfloat16")
        params, batch = _params(cfg), _batch(cfg)
        exact = _jitted_logits(cfg)(params, batch)
        logits = _jitted_logits(half)(params, batch)
        error = jnp.sqrt(jnp.mean((logits - exact) ** 2) / jnp.mean(exact**2))
        self.assertBetween(float(error), 1e-4, 5e-2)
        gradients = jax.eval_shape(jax.grad(functools.partial(_loss, half)), params, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradients, params)
        for leaf in jax.tree.leaves(gradients):
            self.assertEqual(leaf.dtype, jnp.float32)

    def test_unknown_layer_kind(self):
        cfg = dataclasses.replace(_config())
        object.__setattr__(cfg, "layer_kinds", ("round",))
        with self.assertRaisesRegex(ValueError, "'round'"):
            abstract_model(cfg)


class ParametersTest(parameterized.TestCase):
    def test_tied_and_untied_embeddings(self):
        untied, tied = (_config(tie_embeddings=tie) for tie in (False, True))
        size = untied.vocab_size * untied.hidden_size
        self.assertEqual(count_params(untied) - count_params(tied), size)
        for cfg in (tied, untied):
            graphdef = abstract_model(cfg)[0]
            model = nnx.merge(graphdef, _params(cfg))
            matrix = model.unembedding()
            chex.assert_shape(matrix, (cfg.hidden_size, cfg.vocab_size))
            same = np.array_equal(matrix.T, _params(cfg)["embedding"]["table"])
            self.assertEqual(same, cfg.tie_embeddings)

    def test_initial_weights(self):
        """float32, of the config's scale, residual ones smaller; the same in a list and a stack."""
        listed_cfg, cfg = (tiny_model_config(("full",) * 4, scan_layers=s) for s in (False, True))
        listed, params, again = (
            jax.jit(functools.partial(init_params, each))(jax.random.key(0))
            for each in (listed_cfg, cfg, cfg)
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_model(cfg)[1])
        chex.assert_trees_all_equal_shapes_and_dtypes(listed, abstract_model(listed_cfg)[1])
        chex.assert_trees_all_equal(params, again)
        chex.assert_trees_all_close(_stack(listed), params, rtol=1e-6)
        up, down = (
            np.asarray(params["groups"]["layers"][0]["mlp"][name]["weight"])
            for name in ("up", "down")
        )
        self.assertAlmostEqual(up.std(), cfg.init_stddev, delta=0.01)
        self.assertAlmostEqual(down.std(), cfg.init_stddev / (2 * 4) ** 0.5, delta=0.005)
        # No two layers start from the same weights.
        self.assertEqual(len({row.tobytes() for row in up}), 4)

    @parameterized.parameters(
        (("a",) * 3, ("a",)),
        (("a", "b") * 2, ("a", "b")),
        (("a", "a", "b"), ("a", "a", "b")),
        (("a", "b", "a"), ("a", "b", "a")),
    )
    def test_shortest_period(self, kinds, period):
        self.assertEqual(shortest_period(kinds), period)
