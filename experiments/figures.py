"""The four figures of a comparison; each returns False and draws nothing where there is no data."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asa_jax.evaluation.plots import name_length
from experiments.measured import Comparison, Run

DPI = 130
SMOOTHING_STEPS = 20
_COLOURS = matplotlib.colormaps["tab10"]


def draw_losses(data: Comparison, path: Path) -> bool:
    """Training loss over tokens, smoothed, first seed of each model that has been trained."""
    trained = [[run for run in data.of(m) if "train" in run.stages] for m in data.models]
    runs = [of_model[0] for of_model in trained if of_model]
    if not runs:
        return False
    figure = Figure((8, 5), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    for run in runs:
        train = run.stages["train"]
        steps, losses = np.array(train["loss"], float).T
        tokens_per_step = train["tokens"] / train["steps"]
        width = min(SMOOTHING_STEPS, len(losses))
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axis.plot(
            steps[width - 1 :] * tokens_per_step / 1e6, smooth, color=_colour(data, run.model),
            linewidth=1.4, label=run.model,
        )  # fmt: skip
    axis.set(xlabel="tokens (millions)", ylabel=f"loss (nats per token, mean of {width} steps)")
    _finish(axis)
    figure.savefig(path)
    return True


def draw_positions(data: Comparison, path: Path) -> bool:
    """Bits per byte by position: a column for each part, a row for each context; means of seeds."""
    stages = [s for s in ("evaluate", "evaluate_long") if any(s in run.stages for run in data.runs)]
    parts = data.parts()
    if not stages or not parts:
        return False
    size = (1 + 3.6 * len(parts), 0.6 + 3.1 * len(stages))
    figure = Figure(size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(stages), len(parts), squeeze=False)
    for row, stage in zip(axes, stages, strict=True):
        for axis, part in zip(row, parts, strict=True):
            for model in data.models:
                _draw_position_line(axis, data, model, stage, part)
            axis.set_title(part, loc="left", fontsize=10)
            _finish(axis, legend=False)
        row[0].set_ylabel("bits per byte")
    for axis in axes[-1]:
        axis.set_xlabel("position in the window (tokens)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)
    return True


def _draw_position_line(axis: Axes, data: Comparison, model: str, stage: str, part: str) -> None:
    curves = [_buckets(run, stage, part) for run in data.of(model)]
    curves = [curve for curve in curves if curve]
    if not curves:
        return
    middles = [(bucket["first"] + bucket["last"] + 1) / 2 for bucket in curves[0]]
    values = np.array([[bucket["bits_per_byte"] for bucket in curve] for curve in curves], float)
    colour = _colour(data, model)
    axis.plot(middles, values.mean(axis=0), "o-", color=colour, markersize=3, label=model)
    if len(curves) > 1:
        axis.fill_between(
            middles, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0
        )


def _buckets(run: Run, stage: str, part: str) -> list[dict[str, Any]]:
    results = run.stages.get(stage, {}).get("perplexity", [])
    return next((result["buckets"] for result in results if result["source"] == part), [])


def draw_needles(data: Comparison, path: Path) -> bool:
    """Exact match by length and depth, the models side by side, a row for each task."""
    models = [m for m in data.models if any("retrieval" in run.stages for run in data.of(m))]
    answers = {model: _answers(data.of(model)) for model in models}
    tasks = list(dict.fromkeys(a["task"] for of_model in answers.values() for a in of_model))
    if not tasks:
        return False
    size = (1.2 + 1.9 * len(models), 0.8 + 1.9 * len(tasks))
    figure = Figure(size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(tasks), len(models), squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for axis, model in zip(row, models, strict=True):
            _draw_cells(axis, [a for a in answers[model] if a["task"] == task])
        row[0].set_ylabel(task.replace("_", " "), fontsize=8)
    for axis, model in zip(axes[0], models, strict=True):
        axis.set_title(model, fontsize=9)
    figure.supxlabel("length (tokens)", fontsize=9)
    figure.suptitle("exact match (%) by length and depth", fontsize=10)
    figure.savefig(path)
    return True


def _answers(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Answers of all seeds; a task without depths has the depth None."""
    return [a for run in runs for a in run.stages.get("retrieval", {}).get("answers", [])]


def _draw_cells(axis: Axes, answers: Sequence[dict[str, Any]]) -> None:
    lengths = sorted({a["length"] for a in answers})
    depths = sorted({a["depth"] for a in answers if a["depth"] is not None}) or [None]
    table = np.full((len(depths), len(lengths)), np.nan)
    for i, depth in enumerate(depths):
        for j, length in enumerate(lengths):
            cell = [
                a["exact_match"] for a in answers if (a["depth"], a["length"]) == (depth, length)
            ]
            table[i, j] = statistics.fmean(cell) if cell else np.nan
    axis.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "black" if value > 0.6 else "white"
            axis.text(
                j, i, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=7
            )
    axis.set_xticks(range(len(lengths)), map(name_length, lengths), fontsize=7)
    names = ["" if depth is None else f"{depth:.0%}" for depth in depths]
    axis.set_yticks(range(len(depths)), names, fontsize=7)
    axis.tick_params(length=0)


def draw_cache(data: Comparison, length: int, path: Path) -> bool:
    """Validation loss against bytes of the cache; bars are standard deviations over seeds."""
    points = {
        model: losses
        for model in data.models
        if (losses := [data.mixed_loss(run) for run in data.of(model) if run.bits_per_byte()])
    }
    if not points:
        return False
    figure = Figure((7, 5), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    for model, losses in points.items():
        spread = statistics.stdev(losses) if len(losses) > 1 else None
        kilobytes = (data.cache_bytes(model, length) or 0) / 1000
        loss = statistics.fmean(losses)
        axis.errorbar(
            kilobytes, loss, yerr=spread, fmt=_marker(data, model), capsize=3, label=model,
            color=_colour(data, model),
        )  # fmt: skip
    axis.set(
        xlabel=f"cache, kB a token of a text of {length:,} tokens (bfloat16)",
        ylabel="validation loss (nats per token)",
    )  # fmt: skip
    axis.set_xlim(left=0)
    _finish(axis)
    figure.savefig(path)
    return True


def _colour(data: Comparison, model: str) -> Any:
    return _COLOURS(data.models.index(model) % _COLOURS.N)


def _marker(data: Comparison, model: str) -> str:
    return "osD^vPX<>*"[data.models.index(model) % 10]


def _finish(axis: Axes, *, legend: bool = True) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(frameon=False, fontsize=8)
