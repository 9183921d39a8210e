import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from asa_jax.config import config_from_dict
from asa_jax.errors import ConfigError
from asa_jax.model.mixture_of_experts import MixtureOfExperts
from asa_jax.model.transformer import abstract_model
from asa_jax.training.flops import flops_per_token
from asa_jax.training.optimizer import matrix_axes
from configs import base
from tests.models import QUICK_COMPILE, tiny_model_config

EXPERTS = {
    **base.get_config().model.experts.to_dict(),
    "num_experts": 8, "num_experts_per_token": 3, "expert_size": 6, "num_groups": 4,
    "num_selected_groups": 2, "routed_scale": 1.5,
}  # fmt: skip


def _config(**experts):
    return tiny_model_config(("full",) * 2, hidden_size=16, experts={**EXPERTS, **experts})


def _scores(x, router):
    logits = x @ router.scores.weight[...]
    return jax.nn.softmax(logits) if router.correction is None else jax.nn.sigmoid(logits)


def _chosen(x, router):
    """Which experts [T, E] each token of x [T, D] gets, token by token."""
    cfg, correction = router.cfg, router.correction
    choice = np.asarray(_scores(x, router)) + (0 if correction is None else correction[...])
    chosen = np.zeros(choice.shape, bool)
    for token, row in enumerate(choice.reshape(len(x), cfg.num_groups, -1)):
        best = np.sort(row)[:, -1 if correction is None else -2 :].sum(-1)
        groups = np.argsort(-best)[: cfg.num_selected_groups]
        row = np.where(np.isin(np.arange(len(row)), groups)[:, None], row, -np.inf).ravel()
        chosen[token, np.argsort(-row)[: cfg.num_experts_per_token]] = True
    return chosen


def _every_expert(x, mixture, chosen):
    """Every expert on every token of x [T, D], and the weighted sum of those that are chosen."""
    weights = jnp.where(chosen, _scores(x, mixture.router), 0)
    if mixture.router.cfg.normalize:
        weights /= weights.sum(-1, keepdims=True)
    gate, up, down = (w[...] for w in (mixture.gate, mixture.up, mixture.down))
    hidden = jax.nn.silu(jnp.einsum("TD,EDF->TEF", x, gate)) * jnp.einsum("TD,EDF->TEF", x, up)
    routed = jnp.einsum("TEF,EFD,TE->TD", hidden, down, weights)
    return mixture.router.cfg.routed_scale * routed + mixture.shared(x)


@pytest.mark.parametrize(
    "experts",
    [{}, {"scoring": "softmax", "normalize": False}],
    ids=["sigmoid", "softmax"],
)
def test_equals_all_experts_on_all_tokens(experts):
    mixture = MixtureOfExperts(_config(**experts), rngs=nnx.Rngs(0))
    if mixture.router.correction is not None:
        mixture.router.correction[...] = jnp.linspace(-0.3, 0.3, 8)
    x = jax.random.normal(jax.random.key(1), (10, 16))
    chosen = _chosen(x, mixture.router)
    graphdef, params = nnx.split(mixture)

    def gradients(apply):
        def loss(params, x):
            y = apply(nnx.merge(graphdef, params), x)
            return jnp.sum(jnp.sin(y)), y

        of_loss = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(of_loss, compiler_options=QUICK_COMPILE)(params, x)

    ours = gradients(lambda mixture, x: mixture(x.reshape(2, 5, 16)).reshape(x.shape))
    expected = gradients(lambda mixture, x: _every_expert(x, mixture, chosen))
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_parameters_of_a_model_with_experts():
    _, shapes, axes = abstract_model(dataclasses.replace(_config(), scan_layers=True))
    first, rest = (tree["layers"][0]["mlp"] for tree in (shapes["prefix"], shapes["groups"]))
    assert first["up"]["weight"].shape == (16, 64)
    assert rest["up"].shape == (1, 8, 16, 6)
    names = axes["groups"]["layers"][0]["mlp"]
    assert names["up"] == ("layers", "experts", "embed", "mlp")
    # Muon takes each expert for a matrix, and leaves the router to Adam.
    found = matrix_axes(names["up"])
    assert (found.reduction_axis, found.output_axis) == ((2,), (3,))
    assert matrix_axes(names["router"]["scores"]["weight"]) is None
    assert matrix_axes(names["router"]["correction"]) is None


def test_flops_count_the_experts_that_a_token_gets():
    few, all_of_them = (
        flops_per_token(_config(num_experts_per_token=n, num_selected_groups=4), 10**6, 64)
        for n in (3, 8)
    )
    assert all_of_them - few == 6 * 5 * 3 * 16 * 6


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("experts", {"scoring": "other"}, "experts.scoring = 'other': must be one of softmax, sig"),
        ("experts", {"num_experts": -1}, "experts.num_experts = -1: must be at least 0"),
        (
            "experts",
            {"num_groups": 3},
            "num_experts = 8: must be a multiple of",
        ),
        ("experts", {"num_selected_groups": 5}, "num_selected_groups = 5: must be at most"),
        ("experts", {"num_experts_per_token": 5}, "num_experts_per_token = 5: must be at most 4"),
        (
            "experts",
            {"num_groups": 8, "num_selected_groups": 3},
            "num_groups = 8: must be such that a group has at least 2 experts",
        ),
        ("experts", {"num_dense_layers": 2}, "num_dense_layers = 2: must be below the number of"),
        ("rope_scaling", {"kind": "linear"}, "rope_scaling.kind = 'linear': must be one of none"),
        ("rope_scaling", {"factor": 0.5}, "rope_scaling.factor = 0.5: must be at least 1"),
        (
            "rope_scaling",
            {"beta_fast": 1.0},
            "beta_fast = 1.0: must be above",
        ),
        (
            "rope_scaling",
            {"attention_factor": 2.0},
            "attention_factor = 2.0: must be 1",
        ),
    ],
)
def test_wrong_values(section, change, message):
    config = base.get_config().to_dict()
    config["model"] |= {"layer_kinds": ("full",) * 2, "experts": EXPERTS}
    config["model"][section] = config["model"][section] | change
    with pytest.raises(ConfigError) as error:
        config_from_dict(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": True}, "model.qk_norm = True: must be False where a layer is 'local'"),
        (
            {"attention_bias": True},
            "attention_bias = True: must be False where",
        ),
    ],
)
def test_switches_that_a_layer_does_not_read(change, message):
    config = base.get_config().to_dict()
    config["model"] |= {"layer_kinds": ("local", "global"), **change}
    with pytest.raises(ConfigError) as error:
        config_from_dict(config)
    assert message in str(error.value)
