"""Where the numbers of a run go: metrics.jsonl, TensorBoard files and a plot of the loss.

Only process 0 writes. A line of metrics.jsonl is one step; evaluations are lines of their own, with
fields that begin with `validation_`.
"""

import contextlib
import json
import math
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from asa_jax.errors import UserError

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PLOT = "loss.png"
# What the plot shows: style and label by name.
_CURVES = {"loss": ("-", "training"), "validation_loss": ("o-", "validation")}


class MetricsWriter:
    """Appends the metrics of a run; a context manager that closes its files."""

    def __init__(self, workdir: Path, start_step: int) -> None:
        """Opens the files of a run that begins after `start_step`; what is later there is dropped.

        Args:
            workdir: the run directory.
            start_step: the step that was restored, 0 for a new run.
        """
        self._workdir = workdir
        # What the plot shows, so that it need not be read again for every one.
        self._curves: dict[str, list[tuple[int, float]]] = {name: [] for name in _CURVES}
        for line in _drop_after(workdir / METRICS, start_step):
            self._remember(line["step"], line)
        self._lines = (workdir / METRICS).open("a")
        self._board = _EventFile(workdir / TENSORBOARD, start_step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # On a full disk closing fails too, and the first error is the one to tell.
        with contextlib.suppress(*[OSError] if error else []):
            self._lines.close()
            self._board.close()

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends one line of numbers; None and what is not finite become null.

        Args:
            step: steps done.
            values: numbers by name, with units in the names.

        Raises:
            UserError: the disk is full.
        """
        known = {name: _finite(value) for name, value in values.items()}
        self._remember(step, known)
        try:
            self._lines.write(json.dumps({"step": step, "time": time.time(), **known}) + "\n")
            self._lines.flush()
            self._board.write(step, known)
        except OSError as error:
            raise UserError(f"{self._workdir}: metrics: {error.strerror}") from error

    def plot(self) -> None:
        """Draws training and validation loss of the whole run against the step to loss.png."""
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for name, (style, label) in _CURVES.items():
            if points := self._curves[name]:
                axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
        name = self._workdir.resolve().name
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        temporary = self._workdir / f".{PLOT}"
        figure.savefig(temporary, dpi=120, format="png")
        temporary.replace(self._workdir / PLOT)
        plt.close(figure)

    def _remember(self, step: int, values: Mapping[str, float | None]) -> None:
        for name, points in self._curves.items():
            value = values.get(name)
            if value is not None:
                points.append((step, value))


class _EventFile:
    """A TensorBoard file of scalars.

    Written in place: the thread of tensorboardX's own writer dies on a full disk, and closing then
    waits for it for ever.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}"
        self._records = RecordWriter(str(folder / name))
        self._append(file_version="brain.Event:2")
        # TensorBoard hides what earlier files have from this step on.
        self._append(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        known = [(name, value) for name, value in values.items() if value is not None]
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in known]
        self._append(step=step, summary=Summary(value=scalars))

    def close(self) -> None:
        self._records.close()

    def _append(self, **fields: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; an incomplete last line is left out."""
    path = workdir / METRICS
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # cut off by a kill or a full disk
    return lines


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Leaves out the lines of later steps; returns those that stay."""
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)
    return kept


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
