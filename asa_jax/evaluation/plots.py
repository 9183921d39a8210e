"""Pictures of an evaluation: bits per byte by position, answers by length and depth, accuracies."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from asa_jax.evaluation.results import AnswerResult, ChoiceResult, PerplexityResult

COLOURS = matplotlib.colormaps["viridis"]
DPI = 130


def plot_positions(results: Sequence[PerplexityResult], title: str, path: Path) -> None:
    """Draws bits per byte by position: a panel for each text, a line for each window length."""
    sources = list(dict.fromkeys(result.source for result in results))
    lengths = sorted({result.length for result in results})
    figure = Figure((6.4, 0.6 + 3.2 * len(sources)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(sources), 1, squeeze=False)[:, 0]
    for source, axis in zip(sources, axes, strict=True):
        for result in results:
            if result.source == source:
                colour = COLOURS(0.85 * lengths.index(result.length) / max(1, len(lengths) - 1))
                _draw_line(axis, result, colour)
        axis.set_title(source, loc="left", fontsize=10)
        axis.set_ylabel("bits per byte")
        ticks = sorted({lengths[-1] * eighth // 8 for eighth in range(9)})
        axis.set_xticks(ticks, map(name_length, ticks))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, title="window, mean", title_fontsize=8)
    axes[-1].set_xlabel("position in the window (tokens)")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _draw_line(axis: Axes, result: PerplexityResult, colour: tuple[float, ...]) -> None:
    edges = [bucket.first for bucket in result.buckets] + [result.buckets[-1].last + 1]
    values = [bucket.bits_per_byte for bucket in result.buckets]
    label = f"{name_length(result.length)}, {result.bits_per_byte:.3f}"
    # The short windows lie above the long ones, which go on where they end.
    axis.stairs(
        values,
        edges,
        baseline=None,
        color=colour,
        linewidth=1.8,
        label=label,
        zorder=-result.length,
    )


def plot_tasks(results: Sequence[AnswerResult], title: str, path: Path) -> None:
    """Draws exact match of every generated task by length, as the mean over depths."""
    tasks = list(dict.fromkeys(result.task for result in results))
    lengths = sorted({result.length for result in results if result.length is not None})
    size = (2.2 + 0.75 * len(lengths), 1.4 + 0.36 * len(tasks))
    figure = Figure(size, dpi=DPI, layout="constrained")
    axis = figure.subplots()
    _draw_cells(axis, mean_table(results, tasks, lengths))
    axis.set_xticks(range(len(lengths)), map(name_length, lengths))
    axis.set_yticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
    axis.set_xlabel("length (tokens)", fontsize=9)
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
    size = (0.8 + max(1.7, 0.6 * len(lengths)) * columns, 1.0 + (0.7 + 0.32 * len(depths)) * rows)
    figure = Figure(size, dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for index, (axis, task) in enumerate(zip(axes, tasks, strict=False)):
        own = [result for result in results if result.task == task]
        _draw_cells(axis, _depth_table(own, depths, lengths))
        axis.set_title(task.replace("_", " "), fontsize=9)
        axis.set_xticks(range(len(lengths)), map(name_length, lengths))
        names = [f"{depth:.0%}" for depth in depths] if index % columns == 0 else []
        axis.set_yticks(range(len(names)), names)
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    figure.supxlabel("length (tokens)", fontsize=9)
    figure.supylabel("depth", fontsize=9)
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
    rows, columns = table.shape
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    axis.pcolormesh(*edges, table, vmin=0, vmax=1, cmap=COLOURS, edgecolors="white", linewidth=1.5)
    axis.invert_yaxis()
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "black" if value > 0.6 else "white"
            text = f"{100 * value:.0f}"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)


def name_length(tokens: int) -> str:
    """Short name of a number of tokens: 4k for 4096."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)


def plot_choices(results: Sequence[ChoiceResult], title: str, path: Path) -> None:
    """Draws accuracies with standard errors, plain and per byte, and the level of guessing."""
    figure = Figure((6.4, 1.6 + 0.5 * len(results)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    rows = np.arange(len(results))
    both = np.array([result.accuracy_norm is not None for result in results])
    _draw_bars(
        axis, rows - 0.19 * both, [r.accuracy for r in results],
        [r.accuracy_error for r in results], 0.25, "log-likelihood, or greedy",
    )  # fmt: skip
    _draw_bars(
        axis, rows + 0.19, [r.accuracy_norm for r in results],
        [r.accuracy_norm_error for r in results], 0.7, "log-likelihood per byte",
    )  # fmt: skip
    chance = [np.nan if result.chance is None else result.chance for result in results]
    axis.scatter(chance, rows, s=500, marker="|", color="black", zorder=3, label="guessing")
    axis.set_yticks(rows, [result.task for result in results])
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set_xlim(0, 1)
    axis.set_xlabel("accuracy")
    axis.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([60])
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _draw_bars(
    axis: Axes,
    rows: np.ndarray,
    values: Sequence[float | None],
    errors: Sequence[float | None],
    shade: float,
    label: str,
) -> None:
    widths, spreads = (np.array(column, dtype=float) for column in (values, errors))
    axis.barh(rows, widths, 0.36, xerr=spreads, color=COLOURS(shade), label=label)
