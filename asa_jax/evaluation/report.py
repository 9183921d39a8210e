"""The report of an evaluation: tables on the terminal, one JSON file, PNGs."""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from asa_jax.evaluation import plots
from asa_jax.evaluation.results import (
    AnswerResult,
    ChoiceResult,
    HarnessResult,
    PerplexityResult,
    Result,
)

PACKAGES = ("jax", "flax", "numpy", "tokenizers")
PICTURES = ("bits_per_byte.png", "tasks.png", "depths.png", "choices.png")


def print_report(results: Sequence[Result], console: Console) -> None:
    """Prints a table for each kind of result there is."""
    perplexity, answers, choices, harness = by_kind(results)
    if perplexity:
        console.print(perplexity_table(perplexity))
    if answers:
        console.print(answer_table(answers))
    if choices:
        console.print(choice_table(choices))
    if harness:
        console.print(harness_table(harness))


def write_report(
    results: Sequence[Result], header: dict[str, Any], title: str, folder: Path
) -> list[Path]:
    """Writes results.json and the pictures, in place of those of an earlier evaluation.

    Args:
        results: of all jobs.
        header: what was evaluated and how, for the JSON.
        title: stands above the pictures.
        folder: made if need be.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    perplexity, answers, choices, harness = by_kind(results)
    measured = {
        "perplexity": perplexity, "answers": answers, "choices": choices, "lm_eval": harness
    }  # fmt: skip
    _write_json(folder / "results.json", {**header, "versions": versions(), **measured})
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
    grid = [result for result in answers if result.length is not None]
    if perplexity:
        plots.plot_positions(perplexity, title, folder / "bits_per_byte.png")
    if grid:
        plots.plot_tasks(grid, title, folder / "tasks.png")
    if any(result.depth is not None for result in grid):
        plots.plot_depths(grid, title, folder / "depths.png")
    if choices:
        plots.plot_choices(choices, title, folder / "choices.png")
    names = ("results.json", *PICTURES)
    return [folder / name for name in names if (folder / name).exists()]


def by_kind(
    results: Sequence[Result],
) -> tuple[list[PerplexityResult], list[AnswerResult], list[ChoiceResult], list[HarnessResult]]:
    """Sorts results by their class."""
    return (
        [result for result in results if isinstance(result, PerplexityResult)],
        [result for result in results if isinstance(result, AnswerResult)],
        [result for result in results if isinstance(result, ChoiceResult)],
        [result for result in results if isinstance(result, HarnessResult)],
    )


def perplexity_table(results: Sequence[PerplexityResult]) -> Table:
    """A row for each text and window length."""
    table = _table("Perplexity", "text", "window", "tokens", "bits/byte", "ppl/token", "ppl/byte")
    for result in results:
        table.add_row(
            result.source, f"{result.length:,}", f"{result.tokens:,}",
            f"{result.bits_per_byte:.3f}", f"{result.perplexity_per_token:.2f}",
            f"{result.perplexity_per_byte:.3f}",
        )  # fmt: skip
    return table


def answer_table(results: Sequence[AnswerResult]) -> Table:
    """A row for each task, a column for each length; means over depths."""
    lengths = sorted({result.length for result in results}, key=lambda length: length or 0)
    names = ["file" if length is None else f"{length:,}" for length in lengths]
    table = _table("Exact match, and nats a token of the answers", "task", *names)
    for task in dict.fromkeys(result.task for result in results):
        cells = [[r for r in results if (r.task, r.length) == (task, n)] for n in lengths]
        table.add_row(task, *map(_answer_cell, cells))
    return table


def _answer_cell(results: Sequence[AnswerResult]) -> str:
    if not results:
        return ""
    exact = sum(result.exact_match for result in results) / len(results)
    nats = sum(result.answer_nats for result in results) / len(results)
    return f"{exact:.1%}  {nats:5.2f}"


def choice_table(results: Sequence[ChoiceResult]) -> Table:
    """A row for each file; accuracies with their standard errors."""
    table = _table(
        "Choices and last words", "file", "examples", "accuracy", "per byte", "chance", "ppl"
    )
    for result in results:
        table.add_row(
            result.task, f"{result.examples:,}",
            _percent(result.accuracy, result.accuracy_error),
            _percent(result.accuracy_norm, result.accuracy_norm_error),
            _percent(result.chance, None),
            "" if result.perplexity is None else f"{result.perplexity:.4g}",
        )  # fmt: skip
    return table


def harness_table(results: Sequence[HarnessResult]) -> Table:
    """A row for each metric of lm-eval."""
    table = _table("lm-eval", "task", "metric", "value", "error")
    for result in results:
        error = "" if result.error is None else f"{result.error:.4f}"
        table.add_row(result.task, result.metric, f"{result.value:.4f}", error)
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _percent(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if error is None else f"{value:.1%} ± {error:.1%}"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_plain(content), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    """Makes values that JSON has; what is not finite becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
