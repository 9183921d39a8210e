"""The benchmark of whole models, on models small enough for a CPU."""

import dataclasses
import json

import jax
import pytest

from asa_jax.async_tls import benchmark, benchmark_rows
from asa_jax.async_tls.benchmark_models import MODELS, abstract_caches, model_of, random_caches
from asa_jax.async_tls.benchmark_rows import Arguments
from asa_jax.async_tls.settings import DEFAULTS, decoding_config, key_shape
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


@pytest.mark.parametrize(
    ("method", "host_gib", "rows"),
    [("full", 125, 4), ("async_tls", 125, 8), ("async_tls", 999, 10)],
)
def test_the_most_rows_are_those_that_device_and_host_hold(method, host_gib, rows, monkeypatch):
    monkeypatch.setattr(benchmark_rows, "system_available_bytes", lambda: host_gib * 2**30)
    cfg, free = model_of("qwen3_8b", 0), 60_300_000_000
    settings = decoding_config({**DEFAULTS}, cfg)
    arguments = dataclasses.replace(SMALL, context=98304, method=method)
    assert benchmark_rows._largest(cfg, settings, arguments, free) == rows
    of_layer = 98304 * 2 * 8 * 128 * 2
    if method == "full":
        assert rows == free // (36 * of_layer)
    elif host_gib == 125:  # 34 sparse layers
        assert rows == int(0.9 * 125 * 2**30) // (34 * of_layer)


def test_caches_are_of_their_shapes_and_alike_in_all_rows():
    cfg = tiny_model_config(("mla",) * 2)
    caches = list(random_caches(cfg, 3, 8))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), caches) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_caches(cfg, 3, 8)
    )
    for x in jax.tree.leaves(caches):
        assert (x == x[:1]).all() and x.std() > 0.5
    assert (caches[0][0] != caches[1][0]).any()


@pytest.mark.parametrize("kind", ["full", pytest.param("mla", marks=pytest.mark.slow)])
def test_every_method_is_measured_and_reported(kind, capsys):
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
    said = capsys.readouterr().err
    for method in benchmark.METHODS:
        assert f"progress: tiny, 128 tokens, {method}, batch 2: layer 2 of 2" in said


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
