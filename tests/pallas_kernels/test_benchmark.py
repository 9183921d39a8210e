"""The benchmark without a GPU: its lists, floors, table, command line and lost rows."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import benchmark, measurement, timing
from pallas_kernels.benchmark_floors import Work
from pallas_kernels.benchmark_rows import (
    ASA,
    DENSE_LAYER,
    NSA_16,
    NSA_64,
    PAIR,
    ROWS,
    draw,
    random_lists,
    timed_function,
)  # fmt: skip

BY_NAME = {row.name: row for row in ROWS}


@pytest.mark.parametrize("case", [ASA, NSA_16, NSA_64], ids=str)
@pytest.mark.parametrize("share_half", [False, True])
def test_random_lists_are_lists(case, share_half):
    case = dataclasses.replace(case, num_tokens=4096)
    lists = np.asarray(random_lists(case, share_half))[0]
    own = np.arange(len(lists)) * case.queries_per_selection // case.block_size
    for group, heads in zip(own[::13], lists[::13], strict=True):
        for entries in heads:
            chosen = entries[entries >= 0]
            assert len(chosen) == min(case.num_selected_blocks, group + 1)
            assert (np.diff(chosen) > 0).all()
            assert {0, group, max(0, group - 1)} <= set(chosen.tolist())
            assert (entries[len(chosen) :] == -1).all()


def test_neighbours_share_half_of_the_random_blocks():
    case = dataclasses.replace(NSA_64, num_tokens=65536)
    for share_half, least, most in ((False, 3 / 16, 0.3), (True, 0.55, 0.7)):
        first, second = np.asarray(random_lists(case, share_half))[0, [40_000, 40_001], 0]
        assert least <= np.isin(first, second).mean() <= most


def test_floor_is_the_larger_of_three():
    assert Work(750e9).milliseconds() == pytest.approx(1)
    assert Work(750e9, 13e9).milliseconds() == pytest.approx(2)
    assert Work(750e9, 13e9, 8.55e9).milliseconds() == pytest.approx(3)


def test_floor_of_dense_attention():
    case = dataclasses.replace(BY_NAME[DENSE_LAYER].case, num_tokens=65536)
    flops = 4 * 16 * 64 * 65536**2 / 2
    assert BY_NAME[DENSE_LAYER].floor(case, False) == pytest.approx(1e3 * flops / 750e12)
    assert BY_NAME[DENSE_LAYER].floor(case, True) == pytest.approx(3.5e3 * flops / 750e12)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.op != "dense"], ids=lambda row: row.name
)
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_trace(row, backward, hopper):
    if backward and not row.has_backward:
        pytest.skip("no gradient")
    case = dataclasses.replace(row.case, num_tokens=2048)
    arguments = jax.eval_shape(lambda: draw(row, case, backward))
    results = jax.eval_shape(timed_function(row, case, backward), *arguments)
    if backward:
        assert jax.tree.map(lambda x: x.shape, results[1][0]) == row.shapes(case)
    assert row.floor(case, backward) > 0


def test_timed_loop_repeats_the_call():
    calls = []

    def count():
        calls.append(1)

    def function(x):
        jax.debug.callback(count)
        return x + 1

    loop = timing.compile_loop(function, (jnp.zeros((2, 3)),))
    loop(jnp.zeros((2, 3))).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == timing.CALLS_PER_LOOP
    assert timing.milliseconds(loop, (jnp.zeros((2, 3)),)) > 0
    jax.effects_barrier()


def test_a_lost_row_costs_one_row(monkeypatch, capfd):
    """One process crashes while it measures, one hangs, one works."""
    said = {"length": 8192, "backward": False, "milliseconds": 2.0}
    programs = {
        DENSE_LAYER: f"print('{{}}', flush=True); input(); print('{json.dumps(said)}')",
        PAIR: "print('{}', flush=True); input(); raise SystemExit('out of luck')",
        "select, ASA": "import time; print('{}', flush=True); input(); time.sleep(60)",
    }
    start = measurement.subprocess.Popen

    def popen(command, **options):
        return start([sys.executable, "-c", programs[command[3]]], **options)

    monkeypatch.setattr(measurement.subprocess, "Popen", popen)
    records = benchmark.measure([BY_NAME[name] for name in programs], [8192], 3)
    errors = {record["row"]: record["error"] for record in records if "error" in record}
    assert "out of luck" in errors[PAIR] and "no end in 3 s" in errors["select, ASA"]
    assert set(errors) == {PAIR, "select, ASA"}
    text = benchmark.markdown([r for r in records if len(r) > 1], {"device": "a GPU"})
    assert "2.000" in text and "out of luck" in text


def test_table_compares_with_target_floor_and_dense(tmp_path):
    record = {"length": 65536, "floor_milliseconds": 1.0}
    records = [
        {**record, "row": DENSE_LAYER, "backward": False, "milliseconds": 18.0,
         "target_milliseconds": None},
        {**record, "row": PAIR, "backward": False, "milliseconds": 5.0, "target_milliseconds": 5.6},
        {**record, "row": PAIR, "backward": True, "error": "x", "target_milliseconds": 21},
    ]  # fmt: skip
    about = {"device": "a GPU", "jax": "0", "date": "today"}
    assert (PAIR, "65536", "5.000", "5.6", "20", "failed", "21", "") in benchmark.table(records)
    assert "7.20 x an ASA pair" in benchmark.markdown(records, about)
    benchmark.plot(records, about, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


@pytest.mark.parametrize("arguments", [["--lengths", "100"], ["--lengths", "x"], ["--ops", "y"]])
def test_command_line_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    assert stop.value.code == 2
    assert "error: " + arguments[0] in capsys.readouterr().err


def test_needs_a_gpu(capsys, no_hopper):
    assert benchmark.main([]) == 1
    assert capsys.readouterr().err == (
        "error: the benchmark needs a Hopper GPU (compute capability 9)\n"
    )
