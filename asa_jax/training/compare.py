"""Puts training runs side by side: one table, one JSON file, one plot of their loss curves.

python -m asa_jax.training.compare runs/tiny runs/tiny_full runs/tiny_nsa \\
    --output docs/results/tiny
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from asa_jax.config import config_from_dict
from asa_jax.errors import DataError, exit_on_user_error
from asa_jax.model.param_layout import shortest_period
from asa_jax.model.transformer import count_params
from asa_jax.training.metrics import METRICS, read_metrics
from asa_jax.training.run_directory import CONFIG, run_notes

# Steps over which the noise of single batches is averaged in the plot.
SMOOTHING_STEPS = 10


def summarise(workdir: Path) -> dict[str, Any]:
    """Reads what a run measured.

    Args:
        workdir: a run directory.

    Returns:
        Name, layers, parameters, the last evaluation, the devices (None where the run does not
        know them), the median rate in tokens a second, the sum of step times in seconds, and the
        curves of training and validation loss.

    Raises:
        DataError: there is no run or no evaluation in it.
    """
    lines = read_metrics(workdir)
    steps = [line for line in lines if line.get("loss") is not None]
    evaluations = [line for line in lines if "validation_loss" in line]
    if not steps or not evaluations:
        raise DataError(f"{workdir / METRICS}: holds no training steps with an evaluation")
    config = config_from_dict(json.loads((workdir / CONFIG).read_text()))
    period = shortest_period(config.model.layer_kinds)
    return {
        "run": workdir.resolve().name,
        "layers": f"{config.model.num_layers // len(period)} x {' '.join(period)}",
        "parameters": count_params(config.model),
        "steps": steps[-1]["step"],
        "tokens": sum(line["tokens"] for line in steps),
        "validation_loss": evaluations[-1]["validation_loss"],
        "validation_bits_per_byte": evaluations[-1]["validation_bits_per_byte"],
        "device": run_notes(workdir).get("device"),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steps),
        "step_seconds": sum(line["step_seconds"] for line in steps),
        "loss": [[line["step"], line["loss"]] for line in steps],
        "validation": [[line["step"], line["validation_loss"]] for line in evaluations],
    }


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots smoothed training loss as lines and validation loss as dots, a colour a run."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for run in runs:
        losses = [loss for _, loss in run["loss"]]
        smooth = [
            statistics.fmean(losses[max(0, i + 1 - SMOOTHING_STEPS) : i + 1])
            for i in range(len(losses))
        ]
        label = f"{run['run']}: {run['validation_bits_per_byte']:.3f} bits per byte"
        (line,) = axes.plot([step for step, _ in run["loss"]], smooth, label=label)
        axes.plot(*zip(*run["validation"], strict=True), "o", color=line.get_color())
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(f"training (mean of {SMOOTHING_STEPS} steps) and validation (dots)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def show(runs: Sequence[dict[str, Any]]) -> None:
    """Prints a row for each run."""
    table = Table()
    for heading in ("run", "layers", "parameters", "steps", "validation loss", "bits/byte",
                    "tokens/s", "training s"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("run", "layers") else "right")
    for run in runs:
        table.add_row(
            run["run"], run["layers"], f"{run['parameters']:,}", str(run["steps"]),
            f"{run['validation_loss']:.4f}", f"{run['validation_bits_per_byte']:.4f}",
            f"{run['tokens_per_second']:,.0f}", f"{run['step_seconds']:.0f}",
        )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console.width = 120  # rich takes 80, and would cut the numbers
    console.print(table)


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m asa_jax.training.compare")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.png")
    options = parser.parse_args(arguments)
    runs = [summarise(run) for run in options.runs]
    show(runs)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {platform.system()}",
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
            "runs": runs,
        }
        options.output.with_suffix(".json").write_text(json.dumps(report) + "\n")
        draw(runs, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
