"""The training benchmark: one small row for real, and the table of given numbers."""

from pathlib import Path

import pytest

from asa_jax.training import benchmark

NUMBERS = {
    "mfu": 0.4, "memory_bytes": 2**31, "step_seconds": 0.5, "data_wait_seconds": 0.001,
    "compile_seconds": 61.0,
}  # fmt: skip


def record(name, rate):
    row = next(row for row in benchmark.ROWS if row.name == name)
    return {"name": name, "target": row.target, "tokens_per_second": rate, **NUMBERS}


def test_table_compares_rates_with_targets(tmp_path):
    failed = {"name": "asa_340m 256k", "target": None, "error": "out of memory"}
    records = [record("full_340m 8k", 100_000.0), record("asa_340m 8k", 150_000.0), failed]
    about = {"device": "1 GPU", "date": "today"}
    text = benchmark.markdown(records, about)
    assert "150,000  | 165,000" in text and "40.0" in text and "2.0" in text
    assert "asa_340m 8k : full_340m 8k = 1.50 (target 1.25)" in text
    assert "failed: asa_340m 256k: out of memory" in text and "64k :" not in text
    benchmark.plot(records, about, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rows", "x"], "--rows: unknown ['x']"), (["--sources", "nowhere"], "no token folder")],
)
def test_command_line_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_of_several_gpus_are_measured_where_they_are_named(monkeypatch, tmp_path):
    (tmp_path / "manifest.json").touch()
    sources = ["--sources", str(tmp_path)]
    named = benchmark.parse([*sources, "--rows=asa_1b 8k fsdp 2"]).rows
    assert not set(named) & set(benchmark.parse(sources).rows)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    started = []
    monkeypatch.setattr(benchmark, "Measurement", lambda *_, **given: started.append(given))
    for row in benchmark.ROWS:
        if row.name in ("asa_1b 8k", *named):
            benchmark.start(row, "tokens", "cache")
    assert [given["CUDA_VISIBLE_DEVICES"] for given in started] == ["3", "3,5"]


@pytest.mark.slow
def test_a_row_is_measured_by_another_process_than_the_one_that_compiled(
    token_folder, small_flags, monkeypatch
):
    caches, entries = [], []
    start, measure_in_turn = benchmark.start, benchmark.measure_in_turn
    monkeypatch.setattr(benchmark, "start", lambda *args: caches.append(args[2]) or start(*args))

    def measure(running, timeout_seconds):
        entries.extend(path.name for path in Path(caches[0]).iterdir())
        return measure_in_turn(running, timeout_seconds)

    monkeypatch.setattr(benchmark, "measure_in_turn", measure)
    row = benchmark.Row("small", "configs/base.py", 64, 8, None, tuple(small_flags))
    (record,) = benchmark.measure([row], str(token_folder), 280)
    assert "error" not in record and record["compile_seconds"] > 0
    assert len(caches) == 2 and any(name.startswith("jit_step") for name in entries)
    assert record["tokens_per_second"] == pytest.approx(8 * 64 / record["step_seconds"])
    assert record["step_seconds"] > record["dispatch_seconds"] > 0 and record["loss"] > 0
    assert record["input_tokens_per_second"] > 0
