"""The benchmark of whole models, on models small enough for a CPU."""

import dataclasses
import json

import pytest

from asa_jax.async_tls import benchmark, benchmark_rows
from asa_jax.async_tls.benchmark_models import MODELS, model_of
from asa_jax.async_tls.benchmark_rows import Arguments
from asa_jax.async_tls.settings import key_shape
from tests.models import tiny_model_config

SETTINGS = {"block_size": 4, "num_blocks": 4, "token_budget": 8, "num_dense_layers": 1}
SMALL = Arguments(
    model="tiny", num_layers=0, context=128, method="full", batches=(2, 10**9), settings=SETTINGS,
    cosine=0.9, num_steps=6,
)  # fmt: skip


def test_models_have_the_sizes_of_their_names():
    assert MODELS == benchmark.MODELS
    qwen, glm = (model_of(name, 0) for name in MODELS)
    assert (qwen.num_layers, qwen.num_heads, qwen.hidden_size) == (36, 32, 4096)
    assert (glm.num_layers, glm.num_heads, glm.experts.num_experts) == (47, 20, 64)
    assert key_shape(qwen) == (8, 128, None) and key_shape(glm) == (1, 576, 512)
    assert model_of(MODELS[1], 3).num_layers == 3


@pytest.mark.parametrize("kind", ["full", pytest.param("mla", marks=pytest.mark.slow)])
def test_every_method_is_measured_and_reported(kind):
    cfg = dataclasses.replace(tiny_model_config((kind,) * 2), compute_dtype="bfloat16")
    records = []
    for method in benchmark.METHODS:
        arguments = dataclasses.replace(SMALL, method=method)
        found = list(benchmark_rows.measure(arguments, cfg))
        assert json.loads(json.dumps(found)) == found
        records += [{"model": "tiny", "context": 128, "method": method, **r} for r in found]
    full, sparse = (r for r in records if "milliseconds" in r)
    assert full["batch"] == sparse["batch"] == 2
    # Keys and values of both layers, 128 tokens of 2 rows; with indexes and pools it is another.
    assert full["device_bytes"] == 2 * 128 * 2 * (128 if kind == "full" else 48)
    assert sparse["tokens"] == 2 * SMALL.num_steps
    assert sparse["counters"]["hits"] > 0 and sparse["counters"]["misses"] > 0
    assert sparse["counters"]["to_device_bytes"] > 0
    text = benchmark.markdown(records, {"device": "none"})
    assert text.count("| tiny") == 2 and "x at batch 2" in text
    assert text.count("1000000000 rows do not fit") == 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--models=gpt", "--models: unknown"),
        ("--contexts=5000", "--contexts"),
        ("--batches=0", "--batches"),
        ("--cosine=1.5", "--cosine: 1.5 is not between 0 and 1"),
        ("--steps=2", "--steps: 2 is below 3"),
    ],
)
def test_wrong_flags_are_named(flag, message, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.parse([flag])
    assert error.value.code == 2 and message in capsys.readouterr().err
