"""Times every operation on a Hopper GPU: `python -m pallas_kernels.benchmark --output DIR`.

Prints a table and writes it to DIR as `kernels.md`, `kernels.json` and `kernels.png`. Each row runs
in its own process under a timeout, so that a crash or a hang costs one row. The processes compile
side by side (3 GB of host memory each) and then have the GPU to themselves in turn.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from pallas_kernels import dispatch
from pallas_kernels.benchmark_rows import DENSE_LAYER, PAIR, ROWS, Row
from pallas_kernels.measurement import (
    choose_names,
    describe_setting,
    markdown_report,
    markdown_table,
    measure_in_turn,
    report,
    run_benchmark,
    time_kernels,
)

HEADER = ("row", "T", "fwd ms", "target", "% of floor", "fwd+bwd ms", "target", "% of floor")


def measure(rows: list[Row], lengths: list[int], timeout_seconds: float) -> list[dict[str, Any]]:
    """Returns a record for each row, length and pass, and for each row that failed."""
    texts = ",".join(map(str, lengths))
    running = [time_kernels("pallas_kernels.benchmark_rows", row.name, texts) for row in rows]
    records = []
    for row, results in zip(rows, measure_in_turn(running, timeout_seconds), strict=True):
        for result in results:
            if "length" in result:
                case = dataclasses.replace(row.case, num_tokens=result["length"])
                result["floor_milliseconds"] = row.floor(case, result["backward"])
                target = row.targets.get(result["length"], (None, None))
                result["target_milliseconds"] = target[result["backward"]]
            records.append({"row": row.name, **result})
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    return records


def cells(record: dict[str, Any] | None) -> tuple[str, str, str]:
    """Time, target and percentage of the floor, as text."""
    if record is None:
        return "", "", ""
    target = record["target_milliseconds"]
    target_text = "" if target is None else f"{target:g}"
    if "error" in record:
        return "failed", target_text, ""
    time_ms = record["milliseconds"]
    percentage = 100 * record["floor_milliseconds"] / time_ms
    return f"{time_ms:.3f}", target_text, f"{percentage:.0f}"


def table(records: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Lines of the table, one for each row and length."""
    by_key = {(r["row"], r["length"], r["backward"]): r for r in records if "length" in r}
    keys = dict.fromkeys((row, length) for row, length, _ in by_key)
    return [
        (row, str(length), *cells(by_key.get((row, length, False))),
         *cells(by_key.get((row, length, True))))
        for row, length in keys
    ]  # fmt: skip


def pair_against_dense(records: list[dict[str, Any]]) -> list[str]:
    """How much less a pair of ASA layers takes than two dense layers."""
    times = {
        (r["row"], r["length"], r["backward"]): r.get("milliseconds")
        for r in records
        if "length" in r
    }
    lines = []
    for (row, length, backward), dense in times.items():
        pair = times.get((PAIR, length, backward))
        if row == DENSE_LAYER and dense and pair:
            what = "forward and backward" if backward else "forward"
            lines.append(
                f"- T={length}, {what}: two dense layers take {2 * dense / pair:.2f} x an ASA pair"
            )
    return lines


def markdown(records: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table, what it was measured on and what failed."""
    return markdown_report(
        markdown_table(HEADER, table(records)), about, records,
        lambda r: f"{r['row']}, T={r.get('length')}", pair_against_dense(records),
    )  # fmt: skip


def plot(records: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Draws time over length, forward and with backward side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    names = dict.fromkeys(record["row"] for record in records)
    for backward, panel in enumerate(panels):
        for name in names:
            points = [
                (r["length"], r["milliseconds"], r["target_milliseconds"] or math.nan)
                for r in records
                if r["row"] == name and r.get("backward") == bool(backward) and "milliseconds" in r
            ]
            if not points:
                continue
            lengths, times, targets = zip(*points, strict=True)
            (line,) = panel.plot(lengths, times, marker="o", label=name)
            panel.scatter(lengths, targets, marker="_", s=200, color=line.get_color())
        panel.set(
            xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds",
            title="forward and backward" if backward else "forward (bars: targets)",
        )  # fmt: skip
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{about['device']}, jax {about['jax']}, {about['date']}")
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    ops = sorted({row.op for row in ROWS})
    parser = argparse.ArgumentParser(prog="pallas_kernels.benchmark", description=__doc__)
    parser.add_argument("--ops", default=",".join(ops), help=f"of {','.join(ops)}")
    parser.add_argument("--lengths", default="4096,8192,32768,65536", help="tokens of a row")
    parser.add_argument("--output", type=Path, help="directory for the table, JSON and chart")
    parser.add_argument("--timeout_seconds", type=float, default=120, help="of a row")
    options = parser.parse_args(arguments)
    choose_names(parser, options, "ops", ops)
    try:
        options.lengths = [int(length) for length in options.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths: expected numbers with commas between, got {options.lengths!r}")
    if any(length < 1024 or length % 1024 for length in options.lengths):
        parser.error(f"--lengths: expected multiples of 1024, got {options.lengths}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code, 1 if a measurement failed or there is no GPU."""
    options = parse(arguments)
    if not dispatch.is_hopper():
        print("error: the benchmark needs a Hopper GPU (compute capability 9)", file=sys.stderr)
        return 1
    rows = [row for row in ROWS if row.op in options.ops]
    records = measure(rows, options.lengths, options.timeout_seconds)
    about = describe_setting(records, "pallas_kernels.benchmark", arguments)
    about["setting"] = "batch 1, bfloat16; median device time, warm"
    records = [record for record in records if "device" not in record]
    path = options.output and options.output / "kernels"
    return report(records, about, markdown, path, plot)


if __name__ == "__main__":
    run_benchmark(main)
