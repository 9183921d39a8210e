"""Conversion of layers: exact where it can be, best where not, errors as measured, refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from asa_jax.config import MeshConfig, ModelConfig
from asa_jax.errors import ConfigError
from asa_jax.interop.convert import check_convertible, convert_params
from asa_jax.interop.convert_latent import _factorise, fit_latent
from asa_jax.model.transformer import Transformer, abstract_model, make_attention
from asa_jax.sharding import make_mesh
from tests.models import QUICK_COMPILE, random_params, tiny_model_config

TOKENS = 48
# Latents without a norm, wide enough for all keys and values of a layer; every block selected.
ROOMY: dict[str, Any] = {
    "latent_norm": False, "kv_lora_rank": 72, "group_kv_lora_rank": 40, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 4, "v_head_dim": 16, "window_size": 64,
}  # fmt: skip


def _attention(kind: str, cfg: ModelConfig, params: Any, x: np.ndarray, positions: Any) -> Any:
    module = nnx.eval_shape(lambda: make_attention(kind, cfg, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(module, nnx.Param)
    ones = np.ones(x.shape[:2], np.int32)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(x, np.broadcast_to(positions, x.shape[:2]), ones)

    return np.asarray(jax.jit(apply, compiler_options=QUICK_COMPILE)(params, x))


def _fit(source: ModelConfig, target: ModelConfig, kind: str, x: np.ndarray) -> Any:
    layer = random_params(source)["groups"][0]["layers"][0]["attention"]
    counted = np.ones(x.shape[:2], bool)

    def fit(layer: Any, x: jax.Array) -> Any:
        return fit_latent(layer, source, target, kind, x, counted)

    with jax.default_matmul_precision("highest"):
        return layer, jax.jit(fit, compiler_options=QUICK_COMPILE)(layer, x)


def _inputs(size: int = 32) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((2, TOKENS, size), np.float32)
    x[..., 0] = 1  # what gates without a bias stand on
    return x


@pytest.mark.parametrize("kind", ["mla", "local", "global"])
def test_a_latent_of_full_rank_is_exact_but_for_rotation(kind):
    source, target = tiny_model_config(("full",)), tiny_model_config((kind,), **ROOMY)
    x = _inputs()
    layer, fit = _fit(source, target, kind, x)
    params = fit.params
    if kind == "global":
        saturated = np.zeros_like(params["gates"]["weight"])
        saturated[0] = -40, 40
        params = params | {"gates": {"weight": saturated}}
    expected = _attention("full", source, layer, x, 0)
    np.testing.assert_allclose(_attention(kind, target, params, x, 0), expected, atol=2e-5)
    assert max(fit.key_error, fit.value_error) < 1e-5


def test_one_key_head_keeps_its_rotation():
    source = tiny_model_config(("full",), num_kv_heads=1)
    target = tiny_model_config(("mla",), **ROOMY | {"qk_rope_head_dim": 16})
    x, positions = _inputs(), np.arange(TOKENS)
    layer, fit = _fit(source, target, "mla", x)
    expected = _attention("full", source, layer, x, positions)
    found = _attention("mla", target, fit.params, x, positions)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["mla", "global"])
def test_reported_errors_are_those_of_keys_and_values(kind):
    """At rank 12 of 64, recomputed from the weights: W_UV W_D against W_V, and keys alike."""
    source = tiny_model_config(("full",))
    target = tiny_model_config((kind,), **ROOMY | {"kv_lora_rank": 12, "group_kv_lora_rank": 12})
    x = _inputs()
    layer, fit = _fit(source, target, kind, x)
    down = np.asarray(fit.params["down"]["weight"]).reshape(32, -1, 12)
    latent = np.repeat(np.einsum("BTD,DKR->BTKR", x, down), 4 // down.shape[1], axis=2)

    def relative(found: np.ndarray, pair: int) -> float:
        expected = np.einsum("BTD,DKH->BTKH", x, layer["key_value"]["weight"][pair])
        expected = np.repeat(expected, 2, axis=2)
        return np.linalg.norm(found - expected) / np.linalg.norm(expected)

    value = np.einsum("BTNR,RNH->BTNH", latent, fit.params["value_up"]["weight"])
    assert relative(value, 1) == pytest.approx(float(fit.value_error), rel=1e-3)
    assert 0.1 < fit.value_error < 1 and 0.1 < fit.key_error < 1


def test_latents_that_pass_a_norm_have_unit_scale():
    source, target = tiny_model_config(("full",)), tiny_model_config(("mla",))
    x = _inputs()
    _, fit = _fit(source, target, "mla", x)
    latent = np.einsum("BTD,DR->BTR", x, fit.params["down"]["weight"])
    assert np.mean(latent**2) == pytest.approx(1, rel=1e-3)
    np.testing.assert_array_equal(fit.params["norm"]["scale"], 1)


def test_gates_prefer_selected_tokens():
    source, target = tiny_model_config(("full",)), tiny_model_config(("global",))
    x = _inputs()
    _, fit = _fit(source, target, "global", x)
    gates = 1 / (1 + np.exp(-np.einsum("BTD,DNE->BTNE", x, fit.params["gates"]["weight"])))
    assert gates[..., 0].max() < 0.1 and gates[..., 1].min() > 0.9


def test_narrower_heads_are_the_best_of_their_rank():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 20, 3, 8), np.float32)
    found = np.einsum("ANH,CNH->NAC", *_factorise(left, right, 5))
    u, values, v = np.linalg.svd(np.einsum("ANH,CNH->NAC", left, right), full_matrices=False)
    values[:, 5:] = 0
    np.testing.assert_allclose(found, u * values[:, None] @ v, atol=1e-4)


def _batch() -> dict[str, jax.Array]:
    ids = np.random.default_rng(0).integers(0, 64, (2, TOKENS))
    rows = {"inputs": ids, "positions": np.arange(TOKENS) + 0 * ids, "segment_ids": 1 + 0 * ids}
    return {name: jnp.asarray(row, jnp.int32) for name, row in rows.items()}


def test_a_model_is_converted_layer_by_layer():
    """Copies are exact, through stacking and untying; fitted layers say what they lost."""
    source = tiny_model_config(("full", "full"), tie_embeddings=True)
    target = tiny_model_config(("sliding", "sliding"), scan_layers=True, window_size=64)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, context=1))
    batch, params = _batch(), random_params(source)
    with jax.set_mesh(mesh):
        copied, reports = convert_params(params, source, target, mesh, batch)
        before, now = _logits(source, params, batch), _logits(target, copied, batch)
    np.testing.assert_allclose(now, before, atol=1e-5)
    assert [str(report)[:23] for report in reports] == [
        "layer 0 full -> sliding",
        "layer 1 full -> sliding",
    ]
    assert all(report.output_error < 1e-5 for report in reports)


def _logits(cfg: ModelConfig, params: Any, batch: dict[str, jax.Array]) -> np.ndarray:
    graphdef = abstract_model(cfg)[0]

    def apply(params: Any) -> jax.Array:
        model: Transformer = nnx.merge(graphdef, params)
        return model(batch["inputs"], batch["positions"], batch["segment_ids"]) @ (
            model.unembedding()
        )

    return np.asarray(jax.jit(apply, compiler_options=QUICK_COMPILE)(params))


REFUSED = [
    (("full",), ("nsa",), {}, "layer 0, full -> nsa: there is no such conversion"),
    (("full", "mla"), ("full", "global"), {}, "layer 1, mla -> global: there is no such"),
    (("full",), ("full", "full"), {}, "config.model.num_layers = 2: must be 1"),
    (("full",), ("mla",), {"num_heads": 8}, "config.model.num_heads = 8: layer 0, full -> mla:"),
    (("full",), ("mla",), {"q_lora_rank": 4}, "config.model.q_lora_rank = 4"),
    (("full",), ("full",), {"vocab_size": 72}, "['embedding']['output'] is [32, 64] there and [32"),
    (("full",), ("mla",), {"mlp_size": 72}, "['mlp']['down']['weight'] is [64, 32] there and [72"),
    (("full",), ("sliding",), {"head_dim": 8}, "['key_value']['weight'] is [2, 32, 2, 16] there"),
    (("mla",), ("local",), {"latent_norm": False}, "['norm']['scale'] is [16] there and absent"),
]


@pytest.mark.parametrize(("before", "now", "fields", "message"), REFUSED)
def test_what_cannot_be_converted_is_named(before, now, fields, message):
    with pytest.raises(ConfigError) as caught:
        check_convertible(tiny_model_config(before), tiny_model_config(now, **fields))
    assert message in str(caught.value)


def test_another_rope_theta_is_said(caplog):
    check_convertible(tiny_model_config(("full",)), tiny_model_config(("mla",), rope_theta=5e5))
    assert "config.model.rope_theta is 500000.0, was 10000.0" in caplog.text
