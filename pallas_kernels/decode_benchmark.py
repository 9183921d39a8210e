"""Times every operation on a cache: `python -m pallas_kernels.decode_benchmark --output DIR`.

Prints a table and writes it to DIR as `decode_kernels.md`, `.json` and `.png`: microseconds of one
layer's operation for one token of each row, beside its floor, the bytes that it cannot do without
over what the memory of an H100 delivers. Each operation runs in its own process under a timeout, so
that a crash or a hang costs one operation.

Calls are repeated on the same arrays: what the L2 cache (50 MB) holds may come faster than its
floor.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pallas_kernels.benchmark_chart import plot_over_context
from pallas_kernels.benchmark_floors import HBM_BYTES_PER_SECOND
from pallas_kernels.decode_cases import DECODE_CASES, DecodeCase
from pallas_kernels.measurement import (
    can_run,
    check_numbers,
    choose_names,
    describe_setting,
    markdown_report,
    markdown_table,
    measure_in_turn,
    report,
    run_benchmark,
    time_kernels,
)

HEADER = ("operation", "batch", "context", "us", "floor us", "% of floor")
BATCHES, CONTEXTS = "1,8,32,128", "4096,16384,65536,262144"
OPS = tuple(dict.fromkeys(case.op for case in DECODE_CASES))


def measure(
    cases: list[DecodeCase], implementation: str, batches: str, contexts: str, timeout: float
) -> list[dict[str, Any]]:
    """Returns a record for each case, batch and context, and for each case that failed."""
    module = "pallas_kernels.decode_benchmark_rows"
    running = [time_kernels(module, case.name, implementation, batches, contexts) for case in cases]
    records = []
    for case, results in zip(cases, measure_in_turn(running, timeout), strict=True):
        for result in results:
            if "batch" in result:
                floor = case.floor_bytes(result["batch"], result["context"]) / HBM_BYTES_PER_SECOND
                result["floor_milliseconds"] = 1e3 * floor
            records.append({"case": case.name, **result})
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    return records


def table(records: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Lines of the table, one for each case, batch and context."""
    lines: list[tuple[str, ...]] = []
    for record in records:
        if "batch" not in record:
            continue
        time_us, floor_us = "failed", 1e3 * record["floor_milliseconds"]
        share = ""
        if "milliseconds" in record:
            time_us = f"{1e3 * record['milliseconds']:.1f}"
            share = f"{100 * record['floor_milliseconds'] / record['milliseconds']:.0f}"
        place = (record["case"], str(record["batch"]), str(record["context"]))
        lines.append((*place, time_us, f"{floor_us:.1f}", share))
    return lines


def markdown(records: list[dict[str, Any]], about: dict[str, str]) -> str:
    """The table, what it was measured on and what failed."""
    return markdown_report(
        markdown_table(HEADER, table(records)), about, records,
        lambda r: f"{r['case']}, batch {r.get('batch')}, context {r.get('context')}",
    )  # fmt: skip


def plot(records: list[dict[str, Any]], about: dict[str, str], path: Path) -> None:
    """Draws time over context, a panel for each batch."""
    plot_over_context(
        records, about, path,
        line="case", panel=lambda r: f"batch {r['batch']}", unit="microseconds",
    )  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="pallas_kernels.decode_benchmark", description=__doc__)
    parser.add_argument("--ops", default=",".join(OPS), help=f"of {','.join(OPS)}")
    parser.add_argument("--cases", default="", help="only those whose name contains this")
    parser.add_argument("--batches", default=BATCHES, help="rows of the cache")
    parser.add_argument("--contexts", default=CONTEXTS, help="tokens of a row")
    parser.add_argument("--implementation", default="mosaic_gpu", choices=("mosaic_gpu", "xla"))
    parser.add_argument("--output", type=Path, help="directory for the table, JSON and chart")
    parser.add_argument("--timeout_seconds", type=float, default=300, help="of an operation")
    options = parser.parse_args(arguments)
    choose_names(parser, options, "ops", OPS)
    check_numbers(parser, options, "batches", "contexts")
    options.cases = [
        case for case in DECODE_CASES if case.op in options.ops and options.cases in case.name
    ]
    if not options.cases:
        parser.error("--cases: no operation of --ops has such a name")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code, 1 if a measurement failed or there is no GPU."""
    options = parse(arguments)
    if not can_run(options.implementation):
        return 1
    records = measure(
        options.cases, options.implementation, options.batches, options.contexts,
        options.timeout_seconds,
    )  # fmt: skip
    about = describe_setting(records, "pallas_kernels.decode_benchmark", arguments)
    about["setting"] = f"{options.implementation}, bfloat16; median device time, warm"
    records = [record for record in records if "device" not in record]
    path = options.output and options.output / "decode_kernels"
    return report(records, about, markdown, path, plot)


if __name__ == "__main__":
    run_benchmark(main)
