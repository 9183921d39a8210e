"""The benchmark of decoding without a GPU: its floors, its command in a tiny form, its errors."""

import json

import jax
import pytest

from pallas_kernels import decode_benchmark
from pallas_kernels.decode_cases import DECODE_CASES

BY_NAME = {case.name: case for case in DECODE_CASES}


def test_floors_are_the_bytes_of_what_is_read():
    def numbers(name, context):
        return BY_NAME[name].cache_bytes(1, context) / 2

    assert numbers("dense, 16/4 x 64", 65536) == 65536 * 2 * 4 * 64
    assert numbers("dense, 20 on 576/512", 65536) == 65536 * 576
    assert numbers("window, 16 on 288/256", 65536) == 512 * 288
    assert numbers("compressed, 16/2 on 160/128", 65536) == 4096 * (2 * 128 + 32)
    assert numbers("selected, 16/2 on 160/128", 65536) == 1024 * 2 * 160
    assert numbers("selected, 16/2 on 160/128", 100) == 100 * 2 * 160
    assert numbers("lists, 16/4 x 64", 65536) == 4096 * 4 * 64
    assert numbers("lists kept, 16/4 x 64", 65536) == 0
    case = BY_NAME["dense, 16/4 x 64"]
    assert case.floor_bytes(3, 100) == 3 * (case.cache_bytes(1, 100) + 2 * 2 * 16 * 64)


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_arguments_are_what_the_operations_take(case):
    arguments = jax.eval_shape(lambda: case.arguments(3, 1000))
    jax.eval_shape(lambda x: case.run(x, "xla"), arguments)


def test_lists_hold_different_blocks():
    case = BY_NAME["selected, 16/2 on 160/128"]
    for context, count in ((1025, 64), (500, 32)):
        chosen = case.lists(2, context)
        for entries in chosen.reshape(-1, 64).tolist():
            assert entries[:count] == sorted(set(entries[:count]))
            assert entries[0] == 0 and entries[count - 1] == (context - 1) // 16
            assert entries[count:] == [-1] * (64 - count)


def test_command_writes_table_json_and_chart(tmp_path, capsys):
    arguments = ["--implementation=xla", "--ops=window", "--cases=x 64", "--batches=1,2"]
    arguments += ["--contexts=16", f"--output={tmp_path}"]
    assert decode_benchmark.main(arguments) == 0
    report = json.loads((tmp_path / "decode_kernels.json").read_text())
    places = [(r["case"], r["batch"], r["context"]) for r in report["records"]]
    assert places == [("window, 16/4 x 64", b, 16) for b in (1, 2)]
    assert all(r["milliseconds"] > 0 for r in report["records"])
    assert report["about"]["device"] == jax.devices()[0].device_kind
    assert (tmp_path / "decode_kernels.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "decode_kernels.png").stat().st_size > 5_000


def test_table_shows_what_failed():
    place = {"case": "a", "batch": 1, "floor_milliseconds": 0.05}
    records = [
        {**place, "context": 4096, "milliseconds": 0.1},
        {**place, "context": 8192, "error": "out of luck"},
        {"case": "b", "error": "no end in 3 s"},
    ]
    assert decode_benchmark.table(records) == [
        ("a", "1", "4096", "100.0", "50.0", "50"),
        ("a", "1", "8192", "failed", "50.0", ""),
    ]
    text = decode_benchmark.markdown(records, {"device": "a GPU"})
    assert "context 8192: out of luck" in text and "b, batch None" in text


@pytest.mark.parametrize(
    "argument", ["--batches=0", "--contexts=4k", "--ops=sparse", "--cases=nothing"]
)
def test_command_line_errors(argument, capsys):
    with pytest.raises(SystemExit) as stop:
        decode_benchmark.main([argument])
    assert stop.value.code == 2
    assert f"error: {argument.split('=')[0]}" in capsys.readouterr().err


def test_kernels_need_a_gpu(capsys, no_hopper):
    assert decode_benchmark.main([]) == 1
    assert "error: the kernels need a Hopper GPU" in capsys.readouterr().err
