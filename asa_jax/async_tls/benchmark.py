"""Tokens a second of whole models: `python -m asa_jax.async_tls.benchmark --output DIR`.

Decodes with random weights at the sizes of Qwen3-8B and GLM-4.7-Flash, by full attention with its
cache on the device and by AsyncTLS with caches on the host, each at equal numbers of rows and at
the most that fit. Prints a table and writes it to DIR as `async_tls_decoding_MODELS.md` and
`.json`.

Caches are full of normal keys and values; queries drift by `--cosine`, as `benchmark_models`
describes, and not as those of a text do: hit rates and bytes are those of that drift. Steps are
queued one behind another, as in generate.py; times are medians of three parts. Stalls are transfers
that the host waited for; with back end B3 only the device waits, which nobody counts.

The share of transfers that is hidden is 1 - (step - step without them) / transfers alone: without
them, all of a step is done but to bring blocks and to place them; alone, the same blocks are
brought while the device has nothing else to do.

Each model, context and method has a process of its own, one after another, under a timeout.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from asa_jax.async_tls.settings import BACKENDS, DEFAULTS
from asa_jax.flags import run_command
from pallas_kernels.measurement import (
    Measurement,
    check_numbers,
    choose_names,
    describe_setting,
    markdown_report,
    markdown_table,
    report,
)

MODELS = ("qwen3_8b", "glm_4_7_flash")
METHODS = ("full", "async_tls")
HEADER = (
    "model", "context", "method", "batch", "tokens/s", "ms a step", "hits", "MiB in a token",
    "stalls a step", "transfers alone ms", "hidden", "GiB a row",
)  # fmt: skip
# Nearly all of the memory, at once: what grows piece by piece is never given back to others.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_CLIENT_MEM_FRACTION": "0.94"}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a record for each model, context, method and batch, and for each that failed."""
    settings = {"backend": options.backend, "token_budget": options.token_budget}
    records = []
    for model, context, method in (
        (m, int(c), a) for m in options.models for c in options.contexts for a in options.methods
    ):
        arguments = {
            "model": model, "num_layers": options.num_layers, "context": context,
            "method": method, "batches": options.batches, "settings": settings,
            "cosine": options.cosine, "num_steps": options.steps,
        }  # fmt: skip
        module = ["-m", "asa_jax.async_tls.benchmark_rows", json.dumps(arguments)]
        process = Measurement(module, **ENVIRONMENT)
        for result in process.results(options.timeout_seconds):
            records.append({"model": model, "context": context, "method": method, **result})
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    return records


def table(records: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Lines of the table, one for each measurement."""
    lines = []
    for r in records:
        if "milliseconds" not in r:
            continue
        place = r["model"], str(r["context"]), r["method"], str(r["batch"])
        times = f"{tokens_per_second(r):.1f}", f"{r['milliseconds']:.2f}"
        row_gib = f"{r['device_bytes'] / r['batch'] / 2**30:.2f}"
        lines.append((*place, *times, *_of_transfers(r), row_gib))
    return lines


def tokens_per_second(record: dict[str, Any]) -> float:
    """Of all rows together."""
    return 1e3 * record["batch"] / record["milliseconds"]


def _of_transfers(record: dict[str, Any]) -> tuple[str, ...]:
    if "counters" not in record:
        return ("",) * 5
    counters, tokens = record["counters"], record["tokens"]
    asked, steps = counters["hits"] + counters["misses"], tokens / record["batch"]
    hidden = record["hidden_share"]
    return (
        f"{counters['hits'] / max(1, asked):.1%}",
        f"{counters['to_device_bytes'] / tokens / 2**20:.2f}",
        f"{counters['stalled_transfers'] / steps:.1f}",
        f"{record['milliseconds_of_transfers_alone']:.2f}",
        "" if hidden is None else f"{hidden:.0%}",
    )


def comparisons(records: list[dict[str, Any]]) -> list[str]:
    """A line for each model and context: how much faster, at equal batch and at the largest."""
    timed = [r for r in records if "milliseconds" in r]
    lines = []
    for model, context in dict.fromkeys((r["model"], r["context"]) for r in timed):
        full, sparse = (
            {r["batch"]: tokens_per_second(r) for r in timed
             if (r["model"], r["context"], r["method"]) == (model, context, method)}
            for method in METHODS
        )  # fmt: skip
        equal = [f"{sparse[b] / full[b]:.2f} x at batch {b}" for b in sorted(full.keys() & sparse)]
        if full and sparse:
            most = max(full), max(sparse)
            ratio = sparse[most[1]] / full[most[0]]
            equal.append(f"{ratio:.2f} x at the largest measured ({most[1]} against {most[0]})")
        lines.append(f"- {model}, {context} tokens: {', '.join(equal) or 'nothing to compare'}")
    return lines


def markdown(records: list[dict[str, Any]], about: dict[str, str]) -> str:
    """Table, comparisons, what it was measured on and what failed."""

    def place(record: dict[str, Any]) -> str:
        at = f"{record['context']} tokens, {record['method']}, batch {record.get('batch')}"
        return f"{record['model']}, {at}"

    table_lines = markdown_table(HEADER, table(records))
    return markdown_report(table_lines, about, records, place, comparisons(records))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="asa_jax.async_tls.benchmark", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--contexts", default="49152,98304", help="tokens of a row")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--batches", default="1,max", help="rows; max for as many as fit")
    parser.add_argument("--backend", default=DEFAULTS["backend"], choices=BACKENDS)
    parser.add_argument("--token_budget", type=int, default=1024)
    parser.add_argument("--cosine", type=float, default=0.99, help="of the inputs of two steps")
    parser.add_argument("--steps", type=int, default=32, help="that are timed")
    parser.add_argument("--num_layers", type=int, default=0, help="the first ones; 0 for all")
    parser.add_argument("--output", type=Path, help="directory for table and JSON")
    parser.add_argument("--timeout_seconds", type=float, default=540, help="of a process")
    options = parser.parse_args(arguments)
    check_numbers(parser, options, "contexts")
    choose_names(parser, options, "models", MODELS)
    choose_names(parser, options, "methods", METHODS)
    options.contexts = options.contexts.split(",")
    options.batches = options.batches.split(",")
    _check_ranges(parser, options)
    return options


def _check_ranges(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if not all(b == "max" or (b.isdecimal() and int(b)) for b in options.batches):
        parser.error(f"--batches: expected numbers or max with commas between: {options.batches}")
    if not 0 <= options.cosine <= 1:
        parser.error(f"--cosine: {options.cosine} is not between 0 and 1")
    for name, least in (("steps", 3), ("num_layers", 0), ("token_budget", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: {getattr(options, name)} is below {least}")
    if odd := [c for c in options.contexts if int(c) % 512 or int(c) < 4096]:
        parser.error(f"--contexts: {odd} are not multiples of 512 of at least 4096, as kernels are")


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code, 1 if a measurement failed."""
    options = parse(arguments)
    records = measure(options)
    about = describe_setting(records, "asa_jax.async_tls.benchmark", arguments)
    layers = sorted({(r["model"], r["num_layers"]) for r in records if "params_bytes" in r})
    about["layers"] = ", ".join(f"{model} {number}" for model, number in layers)
    about["setting"] = f"bfloat16, {options.token_budget} tokens of 128 blocks"
    about["back end"] = "; ".join(dict.fromkeys(r["backend"] for r in records if "backend" in r))
    records = [r for r in records if "device" not in r]
    path = options.output and options.output / "_".join(["async_tls_decoding", *options.models])
    return report(records, about, markdown, path)


if __name__ == "__main__":
    run_command(main)
