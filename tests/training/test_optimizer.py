"""Schedules, which parameters decay, and Muon on weights of more than two dimensions."""

import chex
import jax
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from optax.contrib import MuonDimensionNumbers

from asa_jax.model.transformer import abstract_model
from asa_jax.training.optimizer import (
    make_optimizer,
    make_schedule,
    matrix_axes,
    schedule_factor,
)

STEPS = 100


class ScheduleTest(parameterized.TestCase):
    @pytest.fixture(autouse=True)
    def _config(self, make_config):
        self.make_config = make_config

    def _factors(self, **fields):
        overrides = {f"optimizer.{name}": value for name, value in fields.items()}
        config = self.make_config(**overrides, **{"training.steps": STEPS}).optimizer
        is_cosine = config.schedule == "cosine"
        return schedule_factor(make_schedule(config, STEPS), is_cosine, np.arange(STEPS))

    @parameterized.parameters("cosine", "wsd", "constant")
    def test_warms_up_linearly_from_the_first_update(self, schedule):
        factors = self._factors(schedule=schedule, warmup_steps=10)
        np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10, rtol=1e-6)

    @parameterized.parameters(0, 10)
    def test_cosine_ends_at_the_final_ratio(self, warmup):
        factors = self._factors(
            schedule="cosine", warmup_steps=warmup, final_learning_rate_ratio=0.1
        )
        done = (np.arange(warmup, STEPS) + 1 - warmup) / (STEPS - warmup)
        expected = 0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2
        np.testing.assert_allclose(factors[warmup:], expected, rtol=1e-5)

    def test_wsd_is_constant_then_linear(self):
        factors = self._factors(
            schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_learning_rate_ratio=0.0
        )
        np.testing.assert_allclose(factors[9:80], 1)
        np.testing.assert_allclose(factors[80:], 1 - np.arange(1, 21) / 20, atol=1e-6)

    def test_wsd_that_only_decays_starts_after_the_warmup(self):
        factors = self._factors(
            schedule="wsd", warmup_steps=10, decay_fraction=1.0, final_learning_rate_ratio=0.5
        )
        np.testing.assert_allclose(factors[9], 1)
        np.testing.assert_allclose(factors[-1], 0.5, rtol=1e-6)

    def test_constant(self):
        np.testing.assert_allclose(self._factors(schedule="constant", warmup_steps=0), 1)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("embed", "mlp"), ((0,), (1,))),
        (("embed", "heads", "head_dim"), ((0,), (1, 2))),
        (("heads", "head_dim", "embed"), ((0, 1), (2,))),
        (("layers", "heads", "head_dim", "embed"), ((1, 2), (3,))),
        (("layers", "pair", "embed", "kv_heads", "head_dim"), ((2,), (3, 4))),
        (("latent", "heads", "head_dim"), ((0,), (1, 2))),
        (("block", "head_dim", "latent"), ((0, 1), (2,))),
        (("layers", "activation"), None),
        (("vocab", "embed"), None),
        (("embed", "heads", "gates"), None),
        (("layers", "block", "head_dim"), None),
    ],
)
def test_matrix_axes(axes, expected):
    found = matrix_axes(axes)
    assert found == (expected and MuonDimensionNumbers(*expected))


@pytest.mark.parametrize("kind", ["full", "mla", "local", "global", "nsa"])
def test_muon_takes_every_matrix_of_a_layer(make_config, kind):
    config = make_config(**{"model.layer_kinds": (kind,), "model.nsa_compression": "mlp"})
    _, _, axes = abstract_model(config.model)
    for path, names in jax.tree_util.tree_leaves_with_path(
        axes["groups"], is_leaf=lambda node: isinstance(node, tuple)
    ):
        name = jax.tree_util.keystr(path)
        left_out = "scale" in name or "gates" in name or "code" in name
        assert (matrix_axes(names) is None) == left_out, name


# Weights of one layer, as the models have them: name, axes, shape.
LAYER = {
    "query": (("embed", "heads", "head_dim"), (8, 2, 4)),
    "key_value": (("pair", "embed", "kv_heads", "head_dim"), (2, 8, 1, 4)),
    "output": (("heads", "head_dim", "embed"), (2, 4, 8)),
    "gates": (("embed", "heads", "gates"), (8, 2, 2)),
    "norm": (("activation",), (8,)),
}
LAYERS = 3


def _updates(config, axes, values):
    """The last of the updates by gradients values[1:] that start at parameters values[0]."""
    optimizer = make_optimizer(config.optimizer, axes, 1e-3, 1e-3)

    @jax.jit
    def run(params, gradients):
        state = optimizer.init(params)
        for gradient in gradients:
            update, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, update)
        return update

    return run(values[0], values[1:])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stacked_and_separate_layers_get_the_same_updates(make_config, name):
    config = make_config(**{"optimizer.name": name})
    rng = np.random.default_rng(0)
    stacked_axes = {k: ("layers", *axes) for k, (axes, _) in LAYER.items()}
    stacked = [
        {k: rng.normal(size=(LAYERS, *shape)).astype("float32") for k, (_, shape) in LAYER.items()}
        for _ in range(3)
    ]
    separate_axes = {i: {k: axes for k, (axes, _) in LAYER.items()} for i in range(LAYERS)}
    separate = [
        {i: {k: x[i] for k, x in values.items()} for i in range(LAYERS)} for values in stacked
    ]
    together = _updates(config, stacked_axes, stacked)
    apart = _updates(config, separate_axes, separate)
    for i in range(LAYERS):
        chex.assert_trees_all_close(
            {k: x[i] for k, x in together.items()}, apart[i], rtol=1e-4, atol=1e-6
        )


def test_muon_makes_the_matrix_orthogonal_in_its_own_shape(make_config):
    """A [D, N, H] weight gets the update of the [D, N*H] matrix that it is."""
    config = make_config(**{"optimizer.name": "muon", "optimizer.weight_decay": 0.0})
    gradient = np.random.default_rng(0).normal(size=(16, 32)).astype("float32")
    updates = []
    for shape, axes in (((16, 4, 8), ("embed", "heads", "head_dim")), ((16, 32), ("embed", "mlp"))):
        values = [{"w": np.zeros(shape, "float32")}, {"w": gradient.reshape(shape)}]
        updates.append(_updates(config, {"w": axes}, values)["w"].reshape(16, 32))
    chex.assert_trees_all_close(*updates, rtol=1e-4, atol=1e-6)
    singular = np.linalg.svd(updates[1], compute_uv=False)
    assert singular.max() < 2 * singular.min()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_spares_norms(make_config, name):
    config = make_config(**{"optimizer.name": name})
    axes = {k: ("layers", *axes) for k, (axes, _) in LAYER.items()} | {"table": ("vocab", "embed")}
    ones = {k: np.ones((LAYERS, *shape), "float32") for k, (_, shape) in LAYER.items()}
    ones["table"] = np.ones((4, 8), "float32")
    zeros = jax.tree.map(np.zeros_like, ones)
    decayed = {k for k, x in _updates(config, axes, [ones, zeros]).items() if np.all(x < 0)}
    matrices = {"query", "key_value", "output"}
    assert decayed == (matrices if name == "muon" else matrices | {"gates", "table"})


def test_clips_the_global_norm(make_config):
    config = make_config(**{"optimizer.clip_norm": 0.5, "optimizer.weight_decay": 0.0})
    axes = {"a": ("embed", "mlp"), "b": ("activation",)}
    start = {"a": np.zeros((2, 2), "float32"), "b": np.zeros(2, "float32")}
    large = jax.tree.map(lambda x: np.full_like(x, 100), start)
    # Of norm 0.5 all together: six equal numbers.
    clipped = jax.tree.map(lambda x: np.full_like(x, 0.5 / 6**0.5), start)
    chex.assert_trees_all_close(
        _updates(config, axes, [start, clipped, large]),
        _updates(config, axes, [start, clipped, clipped]),
        rtol=1e-5,
    )
