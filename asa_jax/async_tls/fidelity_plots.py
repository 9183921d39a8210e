"""The picture of `fidelity`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asa_jax.async_tls.fidelity_summary import FULL, Perplexity

COLOURS = matplotlib.colormaps["tab10"]
DPI = 130
# Whose change would make those of the others a line at zero.
SHOWN_CHANGE = 15


def plot_fidelity(
    rows: Sequence[Perplexity], jumps: Sequence[dict[str, Any]], title: str, path: Path
) -> None:
    """Draws the change of perplexity by budget, a panel for each length; weight kept; jumps.

    Args:
        rows: of `perplexities`.
        jumps: of `jump_rows`.
        title: of the model.
        path: the file.
    """
    lengths = sorted({row.length for row in rows})
    names = [FULL, *dict.fromkeys(row.decoder for row in rows if row.decoder != FULL)]
    colours = {name: COLOURS(number) for number, name in enumerate(names)} | {FULL: "black"}
    figure = Figure((3.2 * (len(lengths) + 2), 3.8), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(lengths) + 2, squeeze=False)[0]
    for length, axis in zip(lengths, axes, strict=False):
        _draw_changes(axis, [row for row in rows if row.length == length], colours)
        axis.set_title(f"{length} tokens", fontsize=9)
    axes[0].set_ylabel("change of perplexity (%)")
    _draw_mass(axes[-2], [row for row in rows if row.length == lengths[-1]], colours)
    _draw_jumps(axes[-1], jumps, colours)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    lines = [axes[0].plot([], [], color=colour)[0] for colour in colours.values()]
    figure.legend(lines, colours, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"Sparse decoding of {title}", fontsize=11)
    figure.savefig(path)


def _draw_changes(axis: Axes, rows: Sequence[Perplexity], colours: dict[str, Any]) -> None:
    for name, colour in colours.items():
        own = [row for row in rows if row.decoder == name and row.budget]
        axis.errorbar(
            [row.budget for row in own], [100 * row.change for row in own],
            [100 * row.change_error for row in own], color=colour, marker=".", linewidth=1,
            capsize=2,
        )  # fmt: skip
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_ylim(top=min(axis.get_ylim()[1], SHOWN_CHANGE))
    budgets = sorted({row.budget for row in rows if row.budget})
    axis.set_xscale("log", base=2)
    axis.set_xticks(budgets, map(str, budgets))
    axis.set_xlabel("token budget")


def _draw_mass(axis: Axes, rows: Sequence[Perplexity], colours: dict[str, Any]) -> None:
    """Weight kept by layer, at the second budget, where the decoders differ most visibly."""
    budget = sorted({row.budget for row in rows})[:3][-1]
    for row in rows:
        if row.budget == budget:
            axis.plot(row.mass, color=colours[row.decoder], linewidth=1)
    axis.set_title(f"attention weight kept, budget {budget}", fontsize=9)
    axis.set_xlabel("sparse layer")


def _draw_jumps(axis: Axes, jumps: Sequence[dict[str, Any]], colours: dict[str, Any]) -> None:
    if not jumps:
        axis.set_visible(False)
        return
    budgets = sorted({row["budget"] for row in jumps})[:2]
    for row in jumps:
        if row["budget"] in budgets:
            places = range(1, 1 + len(row["nats"]))
            axis.plot(places, row["nats"], color=colours[row["decoder"]], linewidth=1)
    axis.set_title(f"topic jumps: nats a token, budget {budgets[-1]}", fontsize=9)
    axis.set_xlabel("token of the snippet")
