"""Where the numbers of a run go: metrics.jsonl, TensorBoard files and a plot of the loss.

Only process 0 writes. A line of metrics.jsonl is one step; evaluations are lines of their own, with
fields that begin with `validation_`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from tensorboardX import SummaryWriter

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PLOT = "loss.png"


class MetricsWriter:
    """Appends the metrics of a run; a context manager that closes its files."""

    def __init__(self, workdir: Path, start_step: int) -> None:
        """Opens the files of a run that begins after `start_step`; what is later there is dropped.

        Args:
            workdir: the run directory.
            start_step: the step that was restored, 0 for a new run.
        """
        self._workdir = workdir
        _drop_after(workdir / METRICS, start_step)
        self._lines = (workdir / METRICS).open("a")
        self._board = SummaryWriter(
            str(workdir / TENSORBOARD), purge_step=start_step + 1, write_to_disk=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._board.close()

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends one line of numbers; None and what is not finite become null.

        Args:
            step: steps done.
            values: numbers by name, with units in the names.
        """
        known = {name: _finite(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **known}) + "\n")
        self._lines.flush()
        for name, value in known.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def plot(self) -> None:
        """Draws training and validation loss of the whole run."""
        plot_losses(self._workdir)


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


def plot_losses(workdir: Path) -> None:
    """Draws loss against step from metrics.jsonl to loss.png."""
    lines = read_metrics(workdir)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, style, label in (
        ("loss", "-", "training"), ("validation_loss", "o-", "validation")
    ):  # fmt: skip
        points = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=workdir.resolve().name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    temporary = workdir / f".{PLOT}"
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(workdir / PLOT)
    plt.close(figure)


def _drop_after(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
