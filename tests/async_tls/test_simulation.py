"""Scores of a known text against decoding it, and the commands that calibrate and compare."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from asa_jax.async_tls import calibrate, fidelity
from asa_jax.async_tls.calibrate_options import Options as CalibrateOptions
from asa_jax.async_tls.calibration import add_sample, fingerprint_of, load_channels
from asa_jax.async_tls.fidelity_options import Options
from asa_jax.async_tls.fidelity_records import Records
from asa_jax.async_tls.model_layers import build_model, layers_of, prepared, project
from asa_jax.async_tls.selection_masks import Budgets
from asa_jax.async_tls.settings import DEFAULTS, decoding_config
from asa_jax.async_tls.simulation import Simulation
from asa_jax.data.tokenizer import ByteTokenizer
from asa_jax.errors import DataError
from tests.async_tls.test_runners import LAYERS, PROMPTS, SMALL, TOKENS, VOCAB, drawn, generator
from tests.models import random_params, tiny_model_config

TEXT = "It is a truth universally acknowledged, that a single man is in want of a wife.\n" * 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "decoder", "simulated"),
    [("full", "quest", "quest"), ("full", "async_tls", "lagged"), ("mla", "async_tls", "lagged")],
)
def test_what_was_drawn_is_what_the_simulation_finds_most_likely(kind, decoder, simulated):
    one = generator(kind, decoder, **SMALL)
    tokens, runner = drawn(one), one.runner
    # As `make_runner` has them where nothing is calibrated: a quarter of 16 features.
    channels = np.broadcast_to(np.arange(4), (LAYERS, 1 if kind == "mla" else 2, 4))
    simulation = Simulation(runner.cfg, runner.params, channels, block_size=4, num_dense_layers=1)
    budgets = Budgets(jnp.int32(SMALL["token_budget"]), jnp.int32(SMALL["num_blocks"]))
    for prompt, more in zip(PROMPTS, tokens, strict=True):
        cache = fidelity.read_densely(one.runner, np.array(prompt), 64)
        scores = simulation.score(cache, more, len(prompt), simulated, budgets)
        assert np.asarray(scores.correct).all() and len(scores.nll) == TOKENS - 1
        dense = simulation.score(cache, more, len(prompt), "full", budgets)
        assert not np.allclose(dense.nll, scores.nll, atol=1e-3)


def run_folder(tmp_path, monkeypatch):
    """A model of bytes in the place of what --workdir holds."""
    cfg = tiny_model_config(("full",) * LAYERS, vocab_size=VOCAB)
    params, config = random_params(cfg), generator("full", "full").config
    config = dataclasses.replace(config, model=cfg)
    for module in (calibrate, fidelity):
        monkeypatch.setattr(module, "restore_model", lambda *_, **__: (config, params, 7))
        monkeypatch.setattr(module, "use_compilation_cache", lambda: None)
    (tmp_path / "text.txt").write_text(TEXT)
    return cfg, params


def calibrated(tmp_path, cfg):
    settings = decoding_config({**DEFAULTS, **SMALL}, cfg)
    options = CalibrateOptions(
        tmp_path, None, ByteTokenizer(), settings, [tmp_path / "text.txt"], 3, 64,
        tmp_path / "channels",
    )  # fmt: skip
    calibrate.main(options)
    return options


def test_calibration_saves_the_weightiest_channels_of_this_model(tmp_path, monkeypatch, capsys):
    cfg, params = run_folder(tmp_path, monkeypatch)
    options = calibrated(tmp_path, cfg)
    assert "4 of 16 channels" in capsys.readouterr().out
    fingerprint = fingerprint_of(cfg, params)
    channels = load_channels(options.output, (LAYERS, 2, 4), 16, fingerprint)
    model = build_model(*prepared(cfg, params))
    weights = jnp.zeros((2, 16))
    for tokens in calibrate.read_samples(options):
        x, positions = model.embedding(tokens[None]), jnp.arange(64)[None]
        first = project(layers_of(model)[0], x, positions)
        weights = add_sample(weights, first.query, first.key)
    best = np.sort(np.argsort(-np.asarray(weights), axis=1)[:, :4], axis=1)
    np.testing.assert_array_equal(channels[0], best)
    short = options._replace(sample_tokens=2**20)
    with pytest.raises(DataError, match=r"text.txt: shorter than --sample_tokens=1048576"):
        calibrate.read_samples(short)


@pytest.mark.slow
def test_comparison_goes_on_after_an_interrupt_and_gives_the_same(tmp_path, monkeypatch, capsys):
    cfg, _ = run_folder(tmp_path, monkeypatch)
    channels = calibrated(tmp_path, cfg).output
    options = Options(
        workdir=tmp_path, step=None, tokenizer=ByteTokenizer(),
        settings=decoding_config({**DEFAULTS, **SMALL}, cfg), channels=channels,
        text=[tmp_path / "text.txt"], filler=tmp_path / "text.txt", lengths=(64, 128),
        budgets=(8, 16), candidates=(2,), num_contexts=(1, 2), tail_tokens=16, task_length=512,
        num_samples=0, output=tmp_path / "whole",
    )  # fmt: skip
    fidelity.main(options)
    again = dataclasses.replace(options, output=tmp_path / "parts")
    add, left = Records.add, iter(range(20))

    def add_some(records, record):
        if next(left, None) is None:
            raise KeyboardInterrupt
        add(records, record)

    monkeypatch.setattr(Records, "add", add_some)
    with pytest.raises(KeyboardInterrupt):
        fidelity.main(again)
    part = json.loads((tmp_path / "parts.json").read_text())
    assert 0 < part["contexts"] < part["contexts_wanted"]
    monkeypatch.setattr(Records, "add", add)
    with pytest.raises(DataError, match=r"parts.partial.jsonl: was begun with other settings"):
        fidelity.main(dataclasses.replace(again, budgets=(8,)))
    fidelity.main(again)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "parts"))
    assert one["perplexity"] == two["perplexity"] and one["jumps"] == two["jumps"]
    assert not list(Path(tmp_path).glob("*.partial.jsonl"))
    rows = {(row["length"], row["decoder"], row["budget"]): row for row in one["perplexity"]}
    assert {length for length, _, _ in rows} == {64, 128} and rows[128, "full", 0]["change"] == 0
    assert rows[128, "full", 0]["tokens"] == 32 and rows[64, "quest", 8]["change"] != 0
    assert rows[128, "oracle_topk", 16]["recall"] == [1.0]
    assert "lagged_x2" in (tmp_path / "whole.md").read_text()
