"""Training speed of the models in the table: `python -m asa_jax.training.benchmark --output DIR`.

Prints a table and writes it to DIR as `training.md`, `training.json` and `training.png`. Each row
is a run of `speed`, compiled beside the others and then measured with its GPUs to itself; one that
fails costs its own line alone. Rows of several GPUs are measured where `--rows` names them.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from asa_jax.flags import run_command
from pallas_kernels.measurement import (
    Measurement,
    choose_names,
    describe_setting,
    markdown_report,
    markdown_table,
    measure_in_turn,
    report,
)

HEADER = (
    "row", "tokens/s", "target", "MFU %", "step s", "input wait s", "peak GiB", "compile s",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table; target in tokens a second, None where it only has to run."""

    name: str
    config: str
    tokens: int  # of a sequence
    batch: int
    target: float | None
    flags: tuple[str, ...] = ()
    devices: int = 1


LISTED, SCANNED = (f"--config.model.scan_layers={value}" for value in (False, True))
LISTED_WHOLE = (LISTED, "--config.model.remat=none", "--config.optimizer.device_tokens=16384")
SCANNED_ANEW = (SCANNED, "--config.model.remat=full")  # as a list it takes minutes to compile
ROWS = (
    Row("full_340m 8k", "configs/full_340m.py", 8192, 8, 130_000),
    Row("asa_340m 8k", "configs/asa_340m.py", 8192, 8, 165_000),
    Row("full_340m 64k", "configs/full_340m.py", 65536, 1, None),
    Row("asa_340m 64k", "configs/asa_340m.py", 65536, 1, 140_000),
    Row("asa_340m 256k", "configs/asa_340m.py", 262144, 1, None, SCANNED_ANEW),
    Row("asa_1b 8k", "configs/asa_1b.py", 8192, 8, 52_000, LISTED_WHOLE),
    Row(
        "asa_1b 64k", "configs/asa_1b.py", 65536, 1, 46_000,
        (LISTED, "--config.model.remat=attention"),
    ),
    *(
        Row(
            f"asa_1b 8k fsdp {n}", "configs/asa_1b.py", 8192, 8 * n, None,
            ("--config.mesh.data=1", f"--config.mesh.fsdp={n}", *LISTED_WHOLE), n,
        )
        for n in (2, 4)
    ),
    *(
        Row(
            f"asa_340m {256 * n}k context {n}", "configs/asa_340m.py", 262144 * n, 1, None,
            ("--config.mesh.data=1", f"--config.mesh.context={n}", *SCANNED_ANEW), n,
        )
        for n in (2, 4)
    ),
)  # fmt: skip
RATIOS = (  # first row, second row, at least
    ("asa_340m 8k", "full_340m 8k", 1.25),
    ("asa_340m 64k", "full_340m 64k", 3.3),
    ("asa_340m 64k", "asa_340m 8k", 0.85),
    ("asa_1b 8k fsdp 4", "asa_1b 8k", 3.6),
)


def measure(rows: list[Row], sources: str, timeout_seconds: float) -> list[dict[str, Any]]:
    """Returns a record for each row: its results, or an error.

    Who compiles keeps memory of the device, which the largest rows need; so processes leave what
    they compiled in a cache, and others measure.
    """
    records = []
    with tempfile.TemporaryDirectory() as cache:
        compiling = [start(row, sources, cache) for row in rows]
        deadline = time.monotonic() + timeout_seconds
        compiled = [process.end_compiled(deadline) for process in compiling]
        running = [start(row, sources, cache) for row in rows]
        measured = measure_in_turn(running, timeout_seconds)
        for row, first, results in zip(rows, compiled, measured, strict=True):
            record = dataclasses.asdict(row)
            for result in [*results, first]:  # what compiling took the first time
                record |= result
            records.append(record)
            print(json.dumps(record), file=sys.stderr, flush=True)
    return records


def start(row: Row, sources: str, cache: str) -> Measurement:
    """Starts the process of a row, with a folder for compiled programs."""
    return Measurement(
        [
            "-m", "asa_jax.training.speed", f"--config={row.config}",
            f"--config.data.sources={(sources,)}",
            f"--config.data.sequence_length={row.tokens}",
            f"--config.data.batch_size={row.batch}",
            *row.flags,
        ],
        JAX_COMPILATION_CACHE_DIR=cache,
        CUDA_VISIBLE_DEVICES=",".join(_gpus()[: row.devices]),
    )  # fmt: skip


def _gpus() -> list[str]:
    """Names of the GPUs that may be used, more than there are where nobody said which."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(n) for n in range(max(r.devices for r in ROWS))]


def cells(record: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    target = f"{record['target']:,.0f}" if record["target"] else "runs"
    if "tokens_per_second" not in record:
        return record["name"], "failed", target, *[""] * (len(HEADER) - 3)
    mfu, memory = record["mfu"], record["memory_bytes"]
    return (
        record["name"],
        f"{record['tokens_per_second']:,.0f}",
        target,
        f"{100 * mfu:.1f}" if mfu else "",
        f"{record['step_seconds']:.3f}",
        f"{record['data_wait_seconds']:.3f}",
        f"{memory / 2**30:.1f}" if memory else "",
        f"{record['compile_seconds']:.0f}",
    )


def ratios(records: list[dict[str, Any]]) -> list[str]:
    """How rates of two rows compare with what they are to reach."""
    rates = {r["name"]: r["tokens_per_second"] for r in records if "tokens_per_second" in r}
    return [
        f"- {first} : {second} = {rates[first] / rates[second]:.2f} (target {least})"
        for first, second, least in RATIOS
        if first in rates and second in rates
    ]


def markdown(records: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table, its ratios, what it was measured on and what failed."""
    table = markdown_table(HEADER, [cells(record) for record in records])
    return markdown_report(table, about, records, lambda r: r["name"], ratios(records))


def plot(records: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Draws the rates as bars beside their targets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [record for record in records if "tokens_per_second" in record]
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.bar([r["name"] for r in done], [r["tokens_per_second"] for r in done])
    for place, record in enumerate(done):
        if record["target"]:
            axes.hlines(record["target"], place - 0.4, place + 0.4, colors="black")
    axes.set(ylabel="tokens/s (lines: targets)", title=f"{about.get('device')}, {about['date']}")
    axes.tick_params(axis="x", rotation=30)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(prog="asa_jax.training.benchmark", description=__doc__)
    parser.add_argument(
        "--rows",
        default=",".join(row.name for row in ROWS if row.devices == 1),
        help=f"names with commas between, of: {', '.join(names)}",
    )
    parser.add_argument("--sources", default="tokens/bundled", help="token folder to train on")
    parser.add_argument("--output", type=Path, help="directory for the table, JSON and chart")
    parser.add_argument("--timeout_seconds", type=float, default=240, help="of a row")
    options = parser.parse_args(arguments)
    choose_names(parser, options, "rows", names)
    if not Path(options.sources, "manifest.json").is_file():
        parser.error(
            f"--sources: {options.sources} is no token folder; `make tokens` makes tokens/bundled"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code, 1 if a row failed."""
    options = parse(arguments)
    rows = [row for row in ROWS if row.name in options.rows]
    records = measure(rows, options.sources, options.timeout_seconds)
    about = describe_setting(records, "asa_jax.training.benchmark", arguments)
    path = options.output and options.output / "training"
    return report(records, about, markdown, path, plot)


if __name__ == "__main__":
    run_command(main)
