"""Processes that compile side by side and then have the device to themselves, one after another.

A process prints a line once it has compiled, waits for a line on its input, and then prints what it
measures, all as JSON. One that crashes or hangs costs its own lines alone. The same for what is
made of the lines: a table and files.
"""

import argparse
import datetime
import json
import os
import select
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pallas_kernels import dispatch

# In front of what a process says on stderr to whoever waits for it.
PROGRESS = "progress: "


class Measurement:
    """One such process; its lines of progress are passed on at once."""

    def __init__(self, arguments: list[str], **environment: str) -> None:
        """Starts Python with these arguments; it shall print JSON, a line after it compiled."""
        said, errors = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **environment},
        )
        os.close(errors)
        self._last_said = ""
        self._listener = threading.Thread(target=self._listen, args=(said,), daemon=True)
        self._listener.start()

    def wait_until_compiled(self, deadline: float) -> None:
        """Returns at its first line, at its end, or at the deadline (in time.monotonic)."""
        assert self.process.stdout is not None
        select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))

    def end_compiled(self, deadline: float) -> dict[str, Any]:
        """Its first line, once it compiled; it is ended then, or at the deadline without one."""
        self.wait_until_compiled(deadline)
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 0)
        line = self.process.stdout.readline() if ready else b""
        self.process.kill()
        self.process.communicate()
        return json.loads(line) if line else {}

    def results(self, timeout_seconds: float) -> list[dict[str, Any]]:
        """Lets it measure; returns its lines, with an error if it did not end well and in time."""
        ending = None
        try:
            output, _ = self.process.communicate(b"\n", timeout_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            output, _ = self.process.communicate()
            ending = f"no end in {timeout_seconds:g} s"
        self._listener.join(5)  # longer only where a process of the process is left
        if self.process.returncode:
            ending = f"{ending or f'exit {self.process.returncode}'}: {self._last_said[:200]}"
        lines = [json.loads(line) for line in output.splitlines()]
        return lines + ([{"error": ending}] if ending else [])

    def _listen(self, pipe: int) -> None:
        with open(pipe, errors="replace") as lines:
            for line in filter(str.strip, lines):
                self._last_said = line.strip()
                if line.startswith(PROGRESS):
                    print(line, end="", file=sys.stderr, flush=True)


def time_kernels(module: str, *arguments: str) -> Measurement:
    """Starts a module that times kernels alone."""
    # There is no matrix product outside the kernels, and tuning takes minutes.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    return Measurement(["-m", module, *arguments], XLA_FLAGS=flags)


def measure_in_turn(
    measurements: Sequence[Measurement], timeout_seconds: float
) -> Iterator[list[dict[str, Any]]]:
    """Yields the lines of each process, in order; says on stderr where it is.

    Args:
      measurements: What was started.
      timeout_seconds: Until all have compiled, and again for each to measure.
    """
    started, count = time.monotonic(), len(measurements)

    def say(what: str) -> None:
        print(f"{time.monotonic() - started:4.0f} s: {what}", file=sys.stderr, flush=True)

    say(f"{count} processes compile, for at most {timeout_seconds:g} s")
    for measurement in measurements:
        measurement.wait_until_compiled(started + timeout_seconds)
    for number, measurement in enumerate(measurements, 1):
        say(f"process {number} of {count} measures")
        yield measurement.results(timeout_seconds)


def describe_error(error: Exception) -> str:
    """An error in one line, for a record of a measurement that failed."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def describe_setting(
    records: Sequence[dict[str, Any]], module: str, arguments: Sequence[str] | None
) -> dict[str, str]:
    """What was measured on, when, and by which command: of the records with a device the first."""
    first = next((record for record in records if "device" in record), {})
    return {
        **{name: first[name] for name in ("device", "jax") if name in first},
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", module, *(arguments or sys.argv[1:])]),
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are aligned."""
    lines = [header, ("---",) * len(header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]


def markdown_report(
    table: Sequence[str],
    about: dict[str, str],
    records: Sequence[dict[str, Any]],
    place: Callable[[dict[str, Any]], str],
    remarks: Sequence[str] = (),
) -> str:
    """The text of a report: a table, what follows from it, the setting and what failed.

    Args:
      table: Of `markdown_table`.
      about: Of `describe_setting`.
      records: What was measured, or errors.
      place: Names the measurement of a record that failed.
      remarks: Lines below the table.
    """
    text = [*table, "", *remarks, *[""] * bool(remarks)]
    text += [f"- {name}: {value}" for name, value in about.items()]
    text += [f"- failed: {place(r)}: {r['error']}" for r in records if "error" in r]
    return "\n".join(text) + "\n"


def write_report(
    path: Path, text: str, about: dict[str, str], records: Sequence[dict[str, Any]]
) -> None:
    """Writes `path` with .md, the table, and with .json, all records; makes its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text)
    contents = json.dumps({"about": about, "records": records}, indent=1)
    path.with_suffix(".json").write_text(contents + "\n")


def report(
    records: list[dict[str, Any]],
    about: dict[str, str],
    markdown: Callable[[list[dict[str, Any]], dict[str, str]], str],
    path: Path | None,
    plot: Callable[[list[dict[str, Any]], dict[str, str], Path], None] | None = None,
) -> int:
    """Prints what was measured and writes it.

    Args:
      records: What was measured, or errors.
      about: Of `describe_setting`.
      markdown: Makes the text.
      path: For .md, .json and .png; None writes nothing.
      plot: Draws the chart, if there is one.

    Returns:
      The exit code: 1 if a measurement failed.
    """
    text = markdown(records, about)
    print(text, end="")
    if path is not None:
        write_report(path, text, about, records)
        if plot is not None:
            plot(records, about, path.with_suffix(".png"))
    return int(any("error" in record for record in records))


def run_benchmark(main: Callable[[], int]) -> NoReturn:
    """Runs a benchmark and exits with its code; Ctrl-C or an unwritable file is one line."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def choose_names(
    parser: argparse.ArgumentParser, options: argparse.Namespace, name: str, known: Sequence[str]
) -> None:
    """Splits the text of an option at its commas; refuses names that are not known."""
    names = getattr(options, name).split(",")
    if unknown := set(names) - set(known):
        parser.error(f"--{name}: unknown {sorted(unknown)}, expected some of {list(known)}")
    setattr(options, name, names)


def check_numbers(
    parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str
) -> None:
    """Refuses options whose text is not positive numbers with commas between."""
    for name in names:
        text = getattr(options, name)
        if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
            parser.error(f"--{name}: expected numbers with commas between, got {text!r}")


def can_run(implementation: str) -> bool:
    """Whether this machine runs the implementation; says so on stderr if not."""
    if implementation != "mosaic_gpu" or dispatch.is_hopper():
        return True
    print(
        "error: the kernels need a Hopper GPU (compute capability 9); "
        "--implementation=xla runs anywhere",
        file=sys.stderr,
    )
    return False
