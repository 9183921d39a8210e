"""Times AsyncTLS and others: `python -m pallas_kernels.async_tls_benchmark --output DIR`.

Prints a table and writes it to DIR as `async_tls_kernels.md`, `.json` and `.png`: microseconds of
one layer for one token of each row, keys and values resident, by AsyncTLS (level 1, level 2 and
attention), by the dense kernel, by Quest and by Double Sparsity, each beside its floor, the bytes
that it cannot do without over what the memory of an H100 delivers. Below the table stands from how
many tokens on AsyncTLS is faster than the dense kernel. Each method runs in its own process under a
timeout, so that a crash or a hang costs one method.

Calls go round several layers' arrays, 100 MB where 16 layers have as much, so that a call finds
nothing of its own in the L2 cache. `--methods` may also name parts of AsyncTLS.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pallas_kernels.async_tls_cases import ASYNC_TLS_CASES, METHODS
from pallas_kernels.benchmark_chart import plot_over_context
from pallas_kernels.benchmark_floors import HBM_BYTES_PER_SECOND
from pallas_kernels.measurement import (
    Measurement,
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

HEADER = (
    "layer", "batch", "context", "method", "us", "floor us", "% of floor", "x dense",
    "x double sparsity",
)  # fmt: skip
BATCHES, CONTEXTS = "1,8", "32768,65536,98304,131072"
SHORT_CONTEXTS = "8192,16384"  # where the dense kernel and AsyncTLS are measured too
COMPARED = ("dense", "async_tls", "quest", "double_sparsity", "double_sparsity_top_k")
type Records = list[dict[str, Any]]
type Times = dict[tuple[str, int, int], dict[str, float]]


def measure(options: argparse.Namespace) -> Records:
    """Returns a record for each layer, method, batch and context, and for each that failed."""
    calls = [(case, method) for case in options.cases for method in options.methods]

    def start(name: str, method: str) -> Measurement:
        shorter = options.short_contexts if method in ("dense", "async_tls") else ""
        contexts = ",".join(filter(None, (shorter, options.contexts)))
        arguments = (name, method, options.implementation, options.batches, contexts)
        return time_kernels("pallas_kernels.async_tls_benchmark_rows", *arguments)

    running = [start(case.name, method) for case, method in calls]
    records = []
    measured = measure_in_turn(running, options.timeout_seconds)
    for (case, method), results in zip(calls, measured, strict=True):
        for result in results:
            if "batch" in result:
                floor = case.floor_bytes(method, result["batch"], result["context"])
                result["floor_milliseconds"] = 1e3 * floor / HBM_BYTES_PER_SECOND
            records.append({"case": case.name, "method": method, **result})
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    return records


def times_by_call(records: Records) -> Times:
    """Milliseconds of each method, by layer, batch and context."""
    times: Times = {}
    for record in records:
        if "milliseconds" in record:
            place = record["case"], record["batch"], record["context"]
            times.setdefault(place, {})[record["method"]] = record["milliseconds"]
    return times


def table(records: Records) -> list[tuple[str, ...]]:
    """Lines of the table, one for each layer, batch, context and method."""
    times = times_by_call(records)
    lines: list[tuple[str, ...]] = []
    for record in records:
        if "batch" not in record:
            continue
        place = record["case"], record["batch"], record["context"]
        shown = (*map(str, place), record["method"])
        floor = record["floor_milliseconds"]
        if "milliseconds" not in record:
            lines.append((*shown, "failed", f"{1e3 * floor:.1f}", "", "", ""))
            continue
        time = record["milliseconds"]
        ratios = (
            f"{times[place][other] / time:.2f}" if other in times[place] else ""
            for other in ("dense", "double_sparsity")
        )
        lines.append(
            (
                *shown,
                f"{1e3 * time:.1f}",
                f"{1e3 * floor:.1f}",
                f"{100 * floor / time:.0f}",
                *ratios,
            )
        )
    order = {name: i for i, name in enumerate([c.name for c in ASYNC_TLS_CASES])}
    return sorted(lines, key=lambda line: (order.get(line[0], 0), int(line[1]), int(line[2])))


def crossovers(records: Records) -> Iterator[str]:
    """Tells for each layer and batch from how many tokens on AsyncTLS is faster than dense."""
    times = times_by_call(records)
    for name, batch in dict.fromkeys((name, batch) for name, batch, _ in times):
        gains = sorted(
            (context, of_methods["dense"] - of_methods["async_tls"])
            for (*place, context), of_methods in times.items()
            if place == [name, batch] and {"dense", "async_tls"} <= of_methods.keys()
        )
        if gains:
            yield f"AsyncTLS is faster than dense, {name}, batch {batch}: {_crossover(gains)}"


def _crossover(gains: list[tuple[int, float]]) -> str:
    """Where the gain becomes positive for good, on lines between the contexts measured."""
    slower = [i for i, (_, gain) in enumerate(gains) if gain <= 0]
    if not slower:
        return f"from {gains[0][0]} tokens or fewer on"
    if slower[-1] == len(gains) - 1:
        return f"not up to {gains[-1][0]} tokens"
    (below, loss), (above, gain) = gains[slower[-1] : slower[-1] + 2]
    return f"from about {round(below + (above - below) * loss / (loss - gain), -2):.0f} tokens on"


def markdown(records: Records, about: dict[str, str]) -> str:
    """The table, from where on AsyncTLS is faster, what it was measured on and what failed."""

    def place(record: dict[str, Any]) -> str:
        at = f"batch {record.get('batch')}, context {record.get('context')}"
        return f"{record['method']}, {record['case']}, {at}"

    remarks = [f"- {line}" for line in crossovers(records)]
    return markdown_report(markdown_table(HEADER, table(records)), about, records, place, remarks)


def plot(records: Records, about: dict[str, str], path: Path) -> None:
    """Draws time over context, a panel for each layer and batch."""
    plot_over_context(
        records, about, path,
        line="method", panel=lambda r: f"{r['case']}, batch {r['batch']}", unit="microseconds",
    )  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="pallas_kernels.async_tls_benchmark", description=__doc__)
    parser.add_argument("--cases", default="", help="only layers whose name contains this")
    parser.add_argument("--methods", default=",".join(COMPARED), help=f"of {','.join(METHODS)}")
    parser.add_argument("--batches", default=BATCHES, help="rows of the cache")
    parser.add_argument("--contexts", default=CONTEXTS, help="tokens of a row")
    parser.add_argument(
        "--short_contexts", default=SHORT_CONTEXTS,
        help="also, for dense and async_tls alone; empty for none",
    )  # fmt: skip
    parser.add_argument("--implementation", default="mosaic_gpu", choices=("mosaic_gpu", "xla"))
    parser.add_argument("--output", type=Path, help="directory for the table, JSON and chart")
    parser.add_argument("--timeout_seconds", type=float, default=300, help="of a method")
    options = parser.parse_args(arguments)
    choose_names(parser, options, "methods", METHODS)
    optional = ("short_contexts",) if options.short_contexts else ()
    check_numbers(parser, options, "batches", "contexts", *optional)
    options.cases = [case for case in ASYNC_TLS_CASES if options.cases in case.name]
    if not options.cases:
        parser.error("--cases: no layer has such a name")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code, 1 if a measurement failed or there is no GPU."""
    options = parse(arguments)
    if not can_run(options.implementation):
        return 1
    records = measure(options)
    about = describe_setting(records, "pallas_kernels.async_tls_benchmark", arguments)
    case = options.cases[0]
    about["setting"] = (
        f"{options.implementation}, bfloat16, {case.num_blocks} blocks of {case.block_size}, "
        f"{case.token_budget} tokens and those of 3 blocks; median device time, cold L2 cache"
    )
    records = [record for record in records if "device" not in record]
    path = options.output and options.output / "async_tls_kernels"
    return report(records, about, markdown, path, plot)


if __name__ == "__main__":
    run_benchmark(main)
