"""The benchmark of decoding: its floors, tiny measurements, its table and its errors."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from asa_jax.decoding import benchmark, benchmark_table, speed
from asa_jax.decoding.cache_bytes import allocated_bytes, tree_bytes
from asa_jax.decoding.random_params import random_params
from asa_jax.decoding.step_bytes import read_bytes, serving_shapes, weight_bytes
from tests.models import tiny_model_config

KINDS = ("local", "global")


def test_floors_are_the_bytes_of_what_is_read():
    cfg = tiny_model_config(KINDS)  # float32; lists of 4 blocks of 16, rings of 12
    ring, summaries, lists = 12 * (16 + 8), 64 * (2 * 12 + 8), 4 * 16 * 2 * (12 + 8)
    held = 2 * 4  # the lists themselves
    assert read_bytes(cfg, 3, 1024) == 3 * 4 * (ring + summaries + lists + held)
    assert read_bytes(cfg, 1, 32) == allocated_bytes(cfg, 1, 32)
    full = tiny_model_config(("full",) * 2, scan_layers=True)
    assert read_bytes(full, 2, 1024) == allocated_bytes(full, 2, 1024)
    listed, shapes = serving_shapes(dataclasses.replace(full, compute_dtype="bfloat16"))
    assert not listed.scan_layers
    assert shapes["embedding"]["table"].dtype == jnp.bfloat16
    assert weight_bytes(listed, shapes) == tree_bytes(shapes) - 64 * 32 * 2


@pytest.fixture(scope="module")
def tiny():
    cfg, shapes = serving_shapes(tiny_model_config(KINDS))
    return cfg, shapes, random_params(shapes, cfg.init_stddev)


def test_decoding_is_measured_at_its_context(tiny):
    cfg, shapes, params = tiny
    result = speed.prepare_decode(cfg, shapes, 2, 128)(params)
    assert result["milliseconds"] > 0
    assert result["accounted_bytes"] == allocated_bytes(cfg, 2, 128) == result["allocated_bytes"]
    assert result["read_bytes"] == read_bytes(cfg, 2, 128)


def test_what_does_not_fit_is_not_compiled(tiny, monkeypatch):
    cfg, shapes, params = tiny
    monkeypatch.setattr(speed, "_limit", lambda: 1000)
    needed = tree_bytes(shapes) + allocated_bytes(cfg, 8, 2**20)
    assert speed.prepare_decode(cfg, shapes, 8, 2**20)(params) == {"needed_bytes": needed}


def test_most_rows_that_fit_leave_room_for_the_program(tiny, monkeypatch):
    cfg, shapes, params = tiny
    row = allocated_bytes(cfg, 1, 128)
    monkeypatch.setattr(speed, "_limit", lambda: tree_bytes(shapes) + 99 * row + 1)
    result = speed.prepare_largest(cfg, shapes, 128)(params)
    assert 90 < result["accounted_batch"] < 100  # a row is also hidden states and logits
    assert 0 < result["largest_batch"] < result["accounted_batch"]


def test_random_caches_keep_rows_apart_from_lists(tiny):
    cfg = tiny[0]
    state = speed._fill(speed.empty_state(cfg=cfg, num_rows=2, cache_length=64))
    ring, blocks = state.cache[0]
    for array in jax.tree.leaves((ring, blocks[:4])):
        assert 0.5 < float(jnp.std(array)) < 1.5
    assert int(jnp.max(blocks.block_indices)) == -1


def test_table_compares_with_targets(tmp_path):
    def timed(model, batch, context, milliseconds):
        of_bytes = {"allocated_bytes": 2**20, "accounted_bytes": 2**20}
        place = {"model": model, "row": "decode", "batch": batch, "context": context}
        return {**place, "milliseconds": milliseconds, "floor_milliseconds": 0.5, **of_bytes}

    def fits(model, rows):
        sizes = {"largest_batch": rows, "accounted_batch": rows + 1}
        return {"model": model, "row": "largest", "context": 65536, **sizes}

    records = [
        timed("asa_340m", 1, 4096, 0.75), timed("asa_340m", 1, 262144, 0.9),
        timed("asa_340m", 32, 65536, 1.0), timed("full_340m", 32, 65536, 7.0),
        fits("asa_340m", 90), fits("full_340m", 30),
        {"model": "full_1b", "row": "decode", "batch": 1, "context": 4096, "needed_bytes": 2**30},
        {"model": "asa_1b", "row": "prefill", "error": "out of luck"},
    ]  # fmt: skip
    about = {"device": "a GPU", "jax": "1", "date": "today"}
    text = benchmark_table.markdown(records, about)
    for part in (
        "256k : 4k = 1.20 (at most 1.3)", "7.00 x tokens/s (at least 6)", "does not fit: 1 GiB",
        "rows that fit, 64k: asa_340m 90, full_340m 30: 3.00 x", "by accounting 91 and 31",
        "times the floor: 3 of 4", "failed: asa_1b, prefill, batch None", "| 100.0%",
    ):  # fmt: skip
        assert part in text.replace("over 1.6 ", ""), part
    benchmark_table.plot(records, about, tmp_path / "decoding.png")
    assert (tmp_path / "decoding.png").stat().st_size > 5_000


def test_processes_that_need_most_memory_come_last():
    options = benchmark.parse(["--models=asa_1b,full_340m", "--batches=1,32", "--contexts=128,256"])
    names = [(about["model"], *arguments) for about, arguments in benchmark.processes(options)]
    assert names == [
        *((model, f"--sizes={b}x128,{b}x256") for b in (1, 32) for model in options.models),
        ("asa_1b", "--prefill_tokens=65536"),
        ("asa_1b", "--largest_context=65536"),
        ("full_340m", "--largest_context=65536"),
    ]


@pytest.mark.parametrize(
    "argument", ["--rows=train", "--models=llama", "--batches=0", "--contexts=4k"]
)
def test_command_line_errors(argument, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main([argument])
    assert stop.value.code == 2
    assert f"error: {argument.split('=')[0]}" in capsys.readouterr().err
