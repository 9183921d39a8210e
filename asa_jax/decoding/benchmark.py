"""Decoding of the models in the table: `python -m asa_jax.decoding.benchmark --output DIR`.

Prints tables and writes them to DIR as `decoding.md`, `decoding.json` and `decoding.png`:
milliseconds of a step of whole models beside their floor, the bytes of weights and caches that a
step needs over what the memory of an H100 delivers; how long prompts take, and how many rows fit.
Weights and caches are random. Models and batches are processes of their own (`speed`): all compile
side by side, then have the GPU in turn, and one that fails costs its own lines alone.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from asa_jax.decoding.benchmark_table import markdown, plot
from asa_jax.flags import run_command
from pallas_kernels.benchmark_floors import HBM_BYTES_PER_SECOND
from pallas_kernels.measurement import (
    Measurement,
    check_numbers,
    choose_names,
    describe_setting,
    measure_in_turn,
    report,
)

MODELS = {
    "asa_340m": "configs/asa_340m.py",
    "full_340m": "configs/asa_340m.py:full",
    "asa_1b": "configs/asa_1b.py",
    "full_1b": "configs/asa_1b.py:full",
}
PREFILL_MODELS = ("asa_1b", "full_1b")
ROWS = ("decode", "prefill", "largest")
LONG = 65536  # tokens of a prompt, and of the rows that are to fit
# Of a device's memory: more than the default, as nothing else runs on it.
MEMORY_FRACTION = "0.92"


def processes(options: argparse.Namespace) -> list[tuple[dict[str, Any], list[str]]]:
    """What is known of each process, and its arguments; those that need most memory last."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for row in ROWS:
        if row == "decode" and row in options.rows:
            for batch in options.batches.split(","):
                sizes = ",".join(f"{batch}x{context}" for context in options.contexts.split(","))
                found += [
                    ({"model": model, "row": row, "batch": int(batch)}, [f"--sizes={sizes}"])
                    for model in options.models
                ]
        elif row in options.rows:
            flag = "prefill_tokens" if row == "prefill" else "largest_context"
            models = PREFILL_MODELS if row == "prefill" else options.models
            found += [
                ({"model": model, "row": row}, [f"--{flag}={options.long}"])
                for model in models
                if model in options.models
            ]
    return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a record for each measurement, and for each process that failed."""
    started = processes(options)
    running = [
        Measurement(
            [
                "-m", "asa_jax.decoding.speed", f"--config={MODELS[about['model']]}",
                *arguments, *options.override,
            ],
            XLA_CLIENT_MEM_FRACTION=MEMORY_FRACTION,
        )
        for about, arguments in started
    ]  # fmt: skip
    records = []
    results = measure_in_turn(running, options.timeout_seconds)
    for (about, _), lines in zip(started, results, strict=True):
        for line in lines:
            if "milliseconds" in line:
                floor = (line["weight_bytes"] + line["read_bytes"]) / HBM_BYTES_PER_SECOND
                line["floor_milliseconds"] = 1e3 * floor
            records.append({**about, **line})
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    return records


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="asa_jax.decoding.benchmark", description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {','.join(ROWS)}")
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {','.join(MODELS)}")
    parser.add_argument("--batches", default="1,8,32,128", help="rows of decoding")
    parser.add_argument("--contexts", default="4096,65536,262144", help="tokens of their rows")
    parser.add_argument(
        "--long", default=str(LONG), help="tokens of the prompt, and of the rows that shall fit"
    )
    parser.add_argument(
        "--override", action="append", default=[], help="a flag for all, as --config.model.NAME=X"
    )
    parser.add_argument("--output", type=Path, help="directory for the tables, JSON and chart")
    parser.add_argument("--timeout_seconds", type=float, default=240, help="of a process")
    options = parser.parse_args(arguments)
    choose_names(parser, options, "rows", ROWS)
    choose_names(parser, options, "models", list(MODELS))
    check_numbers(parser, options, "batches", "contexts", "long")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code, 1 if a measurement failed."""
    options = parse(arguments)
    records = measure(options)
    about = describe_setting(records, "asa_jax.decoding.benchmark", arguments)
    records = [record for record in records if "device" not in record]
    path = options.output and options.output / "decoding"
    return report(records, about, markdown, path, plot)


if __name__ == "__main__":
    run_command(main)
