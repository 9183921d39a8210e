"""Pictures of an evaluation: bits per byte by position, answers by length and depth, accuracies."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asa_jax.evaluation.results import AnswerResult, ChoiceResult, PerplexityResult

COLOURS = matplotlib.colormaps["viridis"]
# Fractions of right answers: dark where nothing is found, light where everything is.
SHARES = matplotlib.colormaps["cividis"]
DPI = 130


def plot_positions(results: Sequence[PerplexityResult], title: str, path: Path) -> None:
    """Draws bits per byte by position: a panel for each text, a line for each window length."""
    sources = list(dict.fromkeys(result.source for result in results))
    lengths = sorted({result.length for result in results})
    figure = Figure((6.4, 0.6 + 3.4 * len(sources)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(sources), 1, squeeze=False)[:, 0]
    for source, axis in zip(sources, axes, strict=True):
        for result in results:
            if result.source == source:
                colour = COLOURS(0.9 * lengths.index(result.length) / max(1, len(lengths) - 1))
                _draw_line(axis, result, colour)
        axis.set_title(source, loc="left", fontsize=10)
        axis.set_ylabel("bits per byte")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, title="window", title_fontsize=8)
    axes[-1].set_xlabel("position in the window (tokens)")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _draw_line(axis: Axes, result: PerplexityResult, colour: tuple[float, ...]) -> None:
    edges = [bucket.first for bucket in result.buckets] + [result.buckets[-1].last + 1]
    values = [bucket.bits_per_byte for bucket in result.buckets]
    label = f"{result.length:,} tokens: {result.bits_per_byte:.3f}"
    axis.stairs(values, edges, baseline=None, color=colour, linewidth=1.8, label=label)


def plot_tasks(results: Sequence[AnswerResult], title: str, path: Path) -> None:
    """Draws exact match of every generated task by length, as the mean over depths."""
    tasks = list(dict.fromkeys(result.task for result in results))
    lengths = sorted({result.length for result in results if result.length is not None})
    figure = Figure(
        (2.4 + 0.85 * len(lengths), 1.3 + 0.36 * len(tasks)), dpi=DPI, layout="constrained"
    )
    axis = figure.subplots()
    _draw_cells(axis, mean_table(results, tasks, lengths))
    _label_lengths(axis, lengths)
    axis.set_yticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
    figure.suptitle(f"{title}\nexact match (%)", fontsize=10)
    figure.savefig(path)


def mean_table(
    results: Sequence[AnswerResult], tasks: Sequence[str], lengths: Sequence[int]
) -> np.ndarray:
    """Mean exact match [tasks, lengths]; not a number where nothing was measured."""
    table = np.full((len(tasks), len(lengths)), np.nan)
    for row, task in enumerate(tasks):
        for column, length in enumerate(lengths):
            cell = [r.exact_match for r in results if (r.task, r.length) == (task, length)]
            if cell:
                table[row, column] = np.mean(cell)
    return table


def plot_depths(results: Sequence[AnswerResult], title: str, path: Path) -> None:
    """Draws a heat map of exact match by length and depth for each task that has depths."""
    results = [result for result in results if result.depth is not None]
    tasks = list(dict.fromkeys(result.task for result in results))
    lengths = sorted({result.length for result in results if result.length is not None})
    depths = sorted({result.depth for result in results if result.depth is not None})
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    width = max(2.2, 0.9 + 0.6 * len(lengths))
    size = (0.6 + width * columns, 0.7 + (1.1 + 0.34 * len(depths)) * rows)
    figure = Figure(size, dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, task in zip(axes, tasks, strict=False):
        own = [result for result in results if result.task == task]
        _draw_cells(axis, _depth_table(own, depths, lengths))
        axis.set_title(task.replace("_", " "), fontsize=10)
        _label_lengths(axis, lengths)
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set_ylabel("depth")
    figure.suptitle(f"{title}\nexact match (%)", fontsize=10)
    figure.savefig(path)


def _depth_table(
    results: Sequence[AnswerResult], depths: Sequence[float], lengths: Sequence[int]
) -> np.ndarray:
    table = np.full((len(depths), len(lengths)), np.nan)
    for result in results:
        if result.depth is not None and result.length is not None:
            table[depths.index(result.depth), lengths.index(result.length)] = result.exact_match
    return table


def _draw_cells(axis: Axes, table: np.ndarray) -> None:
    axis.imshow(table, vmin=0, vmax=1, cmap=SHARES, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "black" if value > 0.55 else "white"
            axis.text(
                column,
                row,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                color=colour,
                fontsize=8,
            )
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)


def _label_lengths(axis: Axes, lengths: Sequence[int]) -> None:
    names = [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in lengths]
    axis.set_xticks(range(len(lengths)), names)
    axis.set_xlabel("length (tokens)", fontsize=9)


def plot_choices(results: Sequence[ChoiceResult], title: str, path: Path) -> None:
    """Draws accuracies with standard errors, plain and per byte, and the level of guessing."""
    figure = Figure((6.4, 1.4 + 0.55 * len(results)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    for row, result in enumerate(results):
        axis.barh(
            row - 0.18, result.accuracy, 0.34, xerr=result.accuracy_error, color=COLOURS(0.25),
            label="plain" if row == 0 else None,
        )  # fmt: skip
        if result.accuracy_norm is not None:
            axis.barh(
                row + 0.18, result.accuracy_norm, 0.34, xerr=result.accuracy_norm_error,
                color=COLOURS(0.7),
            )  # fmt: skip
        if result.chance is not None:
            axis.plot([result.chance] * 2, [row - 0.4, row + 0.4], color="black", linewidth=1)
    axis.set_yticks(range(len(results)), [result.task for result in results])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("accuracy")
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
