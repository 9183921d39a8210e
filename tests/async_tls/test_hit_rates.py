"""Which blocks pools hold: lists put to engines anew, against the engines that were asked."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from asa_jax.async_tls import fidelity, hit_rates, hit_rates_options
from asa_jax.async_tls.engine import slots_for
from asa_jax.async_tls.fidelity import read_densely
from asa_jax.async_tls.hit_rates_options import Options
from asa_jax.async_tls.model_layers import caches_of
from asa_jax.async_tls.recorded_choices import RecordingModel, found_blocks, repeated_blocks
from asa_jax.async_tls.settings import DEFAULTS, decoding_config
from asa_jax.data.tokenizer import ByteTokenizer
from asa_jax.decoding.runner import Runner
from asa_jax.errors import ConfigError
from tests.async_tls.test_runners import LAYERS, SMALL, VOCAB, model
from tests.async_tls.test_simulation import calibrated, run_folder

PROMPT, STEPS, SLOTS = 75, 20, 128


@pytest.mark.parametrize("lagged", [True, False])
def test_lists_find_in_an_engine_of_the_same_size_what_the_model_found(lagged):
    cfg, params = model("full")
    runner = Runner(cfg, params, VOCAB)
    settings = decoding_config({**DEFAULTS, **SMALL, "num_dense_layers": 0, "lagged": lagged}, cfg)
    sizes, channels = settings.sizes, np.broadcast_to(np.arange(4), (LAYERS, 2, 4))
    tokens = np.random.default_rng(0).integers(0, VOCAB, PROMPT + STEPS)
    one = RecordingModel(runner.cfg, runner.params, settings, channels, "simulated", "")
    one.load(caches_of(read_densely(runner, tokens[:PROMPT], SLOTS)), np.array([PROMPT]))
    for position, token in enumerate(tokens[PROMPT:], PROMPT):
        one.step(jnp.full(1, token), jnp.full(1, position))
    asked, counters = one.asked, one.figures.counters
    assert asked.shape == (STEPS + lagged, LAYERS, 2, sizes.num_blocks + 3)
    found, engine = found_blocks(asked, sizes, PROMPT, num_slots=slots_for(sizes), lagged=lagged)
    for name in ("hits", "misses", "unused", "stalled_transfers"):
        assert getattr(engine.counters, name) == getattr(counters, name)
    assert found.sum() == counters.hits and ((asked >= 0) & ~found).sum() == counters.misses
    # What was asked for last is still there; a pool for all blocks asks for none twice.
    assert (found | ~repeated_blocks(asked)).all() and repeated_blocks(asked).any()
    roomy, _ = found_blocks(asked, sizes, PROMPT, num_slots=SLOTS // 4, lagged=lagged)
    assert (roomy | ~found).all() and roomy.sum() > found.sum()
    rows = np.moveaxis(np.where(roomy, -1, asked), 0, 2).reshape(LAYERS * 2, -1)
    assert all(np.unique(row[row >= 0], return_counts=True)[1].max() == 1 for row in rows)


def test_blocks_are_repeated_if_the_list_before_has_them():
    lists = np.array([[[[4, 7, -1]]], [[[5, 4, -1]]], [[[5, 4, 7]]]])
    expected = [[False] * 3, [False, True, False], [True, True, False]]
    np.testing.assert_array_equal(repeated_blocks(lists)[:, 0, 0], expected)


@pytest.mark.slow
def test_report_has_every_way_of_decoding(tmp_path, monkeypatch, capsys):
    cfg, _ = run_folder(tmp_path, monkeypatch)
    monkeypatch.setattr(hit_rates, "restore_model", fidelity.restore_model)
    monkeypatch.setattr(hit_rates, "use_compilation_cache", lambda: None)
    options = Options(
        workdir=tmp_path, step=None, tokenizer=ByteTokenizer(),
        settings=decoding_config({**DEFAULTS, **SMALL}, cfg),
        channels=calibrated(tmp_path, cfg).output, text=[tmp_path / "text.txt"],
        lengths=(64, 128), shares=(0.2,), num_contexts=2, tail_tokens=24, output=tmp_path / "rates",
    )  # fmt: skip
    hit_rates.main(options)
    assert str(tmp_path / "rates.png") in capsys.readouterr().out
    written = json.loads((tmp_path / "rates.json").read_text())
    ways = [(r["length"], r["block_size"], r["lagged"], r["drawn"]) for r in written["records"]]
    longest = [(128, 4, True, False), (128, 4, False, False), (128, 4, True, True)]
    assert ways == 2 * [(64, 4, True, False)] + 2 * [*longest, (128, 1, True, False)]
    for record in written["records"]:
        (hits,) = record["hits"]["2"]  # one layer is sparse
        assert 0 < record["repeated"][0] <= hits <= record["hits"]["4"][0] <= 1
        # Lists of two heads are full at these lengths.
        assert record["missed"] == pytest.approx(2 * record["num_blocks"] * (1 - hits), abs=5e-3)
        # Keys and values of 16 float32.
        bytes_of_block = record["block_size"] * 2 * 16 * 4
        assert record["kib"] == pytest.approx(record["missed"] * bytes_of_block / 1024)
    assert len(written["cosines"]["queries"]) == LAYERS
    assert (tmp_path / "rates.md").read_text().count("\n| 128 ") == 4


@pytest.mark.parametrize("given", [["a"], ["0.1", "1.5"], []])
def test_shares_that_are_none_are_refused(given):
    with pytest.raises(ConfigError, match=r"--shares=.*: must be numbers between 0 and 1"):
        hit_rates_options._shares(given)
