"""The benchmark of AsyncTLS without a GPU: its floors, its command in a tiny form, its errors."""

import json

import pytest

from pallas_kernels import async_tls_benchmark
from pallas_kernels.async_tls_benchmark_rows import COLD_BYTES, num_layers
from pallas_kernels.async_tls_cases import ASYNC_TLS_CASES

GROUPED, LATENT = ASYNC_TLS_CASES


def test_floors_are_the_bytes_of_what_is_read():
    def of_cache(case, method):
        of_query = 2 * case.num_heads * (2 * case.width + case.rope_dim)
        return case.floor_bytes(method, 1, 98304) - of_query

    assert of_cache(GROUPED, "dense") == 98304 * 8 * 2 * 128 * 2
    assert of_cache(LATENT, "dense") == 98304 * 576 * 2
    grouped, latent = 1216 * 8 * 2 * 128 * 2, 1216 * 576 * 2
    bounds = {GROUPED: 8 * 1536 * 256 * 2, LATENT: 1536 * 1152 * 2}
    assert of_cache(GROUPED, "attention") == grouped
    assert of_cache(GROUPED, "quest") == grouped + bounds[GROUPED]
    assert of_cache(GROUPED, "async_tls") == grouped + bounds[GROUPED] + 8192 * 8 * 20
    assert of_cache(LATENT, "async_tls") == latent + bounds[LATENT] + 8192 * 68
    assert of_cache(LATENT, "double_sparsity") == latent + 98304 * 68
    assert GROUPED.floor_bytes("dense", 3, 64) == 3 * GROUPED.floor_bytes("dense", 1, 64)


def test_rounds_are_larger_than_the_cache_and_fit_into_memory():
    for case in ASYNC_TLS_CASES:
        for method in async_tls_benchmark.COMPARED:
            for batch, context in ((1, 98304), (8, 131072)):
                num = num_layers(case, method, batch, context)
                size = case.floor_bytes(method, batch, context)
                assert num * size >= 0.75 * COLD_BYTES and (num - 1) * size < COLD_BYTES
    assert num_layers(GROUPED, "dense", 128, 131072) == 0


def test_command_writes_table_json_and_chart(tmp_path, capsys):
    arguments = ["--implementation=xla", "--methods=dense", "--cases=GLM", "--batches=1"]
    arguments += ["--contexts=64", "--short_contexts=", f"--output={tmp_path}"]
    assert async_tls_benchmark.main(arguments) == 0
    report = json.loads((tmp_path / "async_tls_kernels.json").read_text())
    (record,) = report["records"]
    assert (record["method"], record["batch"], record["context"]) == ("dense", 1, 64)
    assert record["milliseconds"] > 0 and record["layers"] == 16
    assert (tmp_path / "async_tls_kernels.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "async_tls_kernels.png").stat().st_size > 5_000


def records_of(times):
    return [
        {
            "case": "a", "method": method, "batch": 1, "context": context,
            "milliseconds": time, "floor_milliseconds": 0.01,
        }
        for (method, context), time in times.items()
    ]  # fmt: skip


def test_table_has_ratios_and_what_failed():
    records = records_of({("dense", 64): 0.1, ("async_tls", 64): 0.05})
    del records[0]["milliseconds"]
    records[0]["error"] = "out of luck"
    records += records_of({("double_sparsity", 64): 0.08})
    records.append({"case": "b", "method": "quest", "error": "no end in 3 s"})
    assert async_tls_benchmark.table(records) == [
        ("a", "1", "64", "dense", "failed", "10.0", "", "", ""),
        ("a", "1", "64", "async_tls", "50.0", "10.0", "20", "", "1.60"),
        ("a", "1", "64", "double_sparsity", "80.0", "10.0", "12", "", "1.00"),
    ]
    text = async_tls_benchmark.markdown(records, {"device": "a GPU"})
    assert "context 64: out of luck" in text and "quest, b, batch None" in text


@pytest.mark.parametrize(
    ("dense", "wanted"),
    [
        ((0.05, 0.1, 0.4), "from about 9800 tokens on"),
        ((0.07, 0.1, 0.4), "from 8192 tokens or fewer on"),
        ((0.01, 0.02, 0.05), "not up to 32768 tokens"),
        ((0.07, 0.05, 0.07), "from about 24600 tokens on"),
    ],
)
def test_crossover_is_where_dense_becomes_slower(dense, wanted):
    contexts = (8192, 16384, 32768)
    times = dict(zip((("dense", c) for c in contexts), dense, strict=True))
    records = records_of({**times, **{("async_tls", c): 0.06 for c in contexts}})
    (line,) = async_tls_benchmark.crossovers(records)
    assert line == f"AsyncTLS is faster than dense, a, batch 1: {wanted}"


@pytest.mark.parametrize(
    "argument", ["--batches=0", "--contexts=", "--methods=sparse", "--cases=nothing"]
)
def test_command_line_errors(argument, capsys):
    with pytest.raises(SystemExit) as stop:
        async_tls_benchmark.main([argument])
    assert stop.value.code == 2
    assert f"error: {argument.split('=')[0]}" in capsys.readouterr().err


def test_kernels_need_a_gpu(capsys, no_hopper):
    assert async_tls_benchmark.main([]) == 1
    assert "error: the kernels need a Hopper GPU" in capsys.readouterr().err
