"""The report of `hit_rates`: JSON with everything, Markdown with the tables, a picture."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asa_jax.evaluation.report import versions
from pallas_kernels.measurement import markdown_table

# Slots of a pool for each block of a list and each that is always kept; the first is the default.
POOL_FACTORS = (2, 3, 4)
HEADER = (
    "tokens", "blocks", "of", "form", "text", "last list", *(f"pool {f}x" for f in POOL_FACTORS),
    "missed", "95%", "KiB",
)  # fmt: skip
COLOURS = matplotlib.colormaps["tab10"]
DPI = 130


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One context, decoded in one way.

    Attributes:
        length: of the context.
        context: its number.
        share: of its blocks, that level 1 keeps.
        block_size: tokens of a block.
        num_blocks: that level 1 keeps.
        lagged: whether blocks are those that the query of the step before chose.
        drawn: whether tokens were drawn.
        repeated: of each sparse layer, the share of asked blocks that the step before asked for.
        hits: by pool, of each sparse layer, the share of asked blocks that were in it.
        missed: blocks that were not in the default pool, of all key heads, a step and layer.
        missed_at_busy_steps: the same mean over layers at the 95th percentile of steps.
        kib: KiB of the missed ones a step and layer, in the model's compute dtype.
    """

    length: int
    context: int
    share: float
    block_size: int
    num_blocks: int
    lagged: bool
    drawn: bool
    repeated: list[float]
    hits: dict[int, list[float]]
    missed: float
    missed_at_busy_steps: float
    kib: float


class Cosines(NamedTuple):
    """Means over successive tokens, of each layer.

    Attributes:
        inputs: of what the projections of attention take.
        queries: of each head's query, rotated.
    """

    inputs: list[float]
    queries: list[float]


def write_report(
    output: Path, header: dict[str, Any], records: Sequence[Record], cosines: Cosines
) -> list[Path]:
    """Writes OUTPUT.json, .md and .png.

    Args:
        output: path without suffix.
        header: what was measured on what.
        records: all of them.
        cosines: of the longest contexts.

    Returns:
        The files.
    """
    header, rows = {**header, "versions": versions()}, means(records)
    paths = [output.with_name(output.name + suffix) for suffix in (".json", ".md", ".png")]
    every = [dataclasses.asdict(record) for record in records]
    values = {**header, "cosines": cosines._asdict(), "records": every}
    paths[0].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(_markdown(header, rows, cosines), encoding="utf-8")
    _plot(rows, cosines, header["model"], paths[2])
    return paths


def means(records: Sequence[Record]) -> list[Record]:
    """Records of the same way and length as one, their means."""
    names = ("length", "share", "block_size", "num_blocks", "lagged", "drawn")
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(getattr(record, name) for name in names), []).append(record)
    return [_mean(group) for group in groups.values()]


def _mean(group: Sequence[Record]) -> Record:
    hits = {f: np.mean([one.hits[f] for one in group], axis=0).tolist() for f in POOL_FACTORS}
    return dataclasses.replace(
        group[0],
        repeated=np.mean([one.repeated for one in group], axis=0).tolist(),
        hits=hits,
        missed=float(np.mean([one.missed for one in group])),
        missed_at_busy_steps=float(np.mean([one.missed_at_busy_steps for one in group])),
        kib=float(np.mean([one.kib for one in group])),
    )


def _markdown(header: dict[str, Any], rows: Sequence[Record], cosines: Cosines) -> str:
    settings = header["settings"]
    inputs, queries = (f"{np.mean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in cosines)
    return "\n".join(
        [
            f"# Blocks that the pool holds already: {header['model']}, step {header['step']}\n",
            f"`{header['command']}`\n",
            f"{header['date']}, {header['devices']}, "
            + ", ".join(f"{name} {version}" for name, version in header["versions"].items())
            + f"; {', '.join(header['texts'])}: {header['contexts']} contexts of each length, "
            f"{header['steps']} steps each; {header['compute_dtype']}; the first "
            f"{settings['num_dense_layers']} layers dense; at most "
            f"{settings['sizes']['token_budget']} tokens kept.\n",
            "`blocks`: that level 1 keeps `of` those of a context. `last list`: share of the blocks"
            " asked for that the step before asked for too. `pool 2x`: share that was in a pool of "
            "twice the blocks of a list, the default; so on. Means, with the worst layer. "
            "`missed`: blocks of all key heads that the default pool lacked, a token and sparse "
            "layer; `95%`: at the 95th percentile of tokens; `KiB`: of the missed.\n",
            *markdown_table(HEADER, [_cells(row) for row in rows]),
            "",
            f"Cosine of successive tokens, mean over layers (least to greatest): inputs of "
            f"attention {inputs}, queries {queries}.",
            "",
        ]
    )


def _cells(row: Record) -> tuple[str, ...]:
    shares = [row.repeated, *(row.hits[factor] for factor in POOL_FACTORS)]
    return (
        str(row.length), str(row.num_blocks), str(row.length // row.block_size),
        "lagged" if row.lagged else "synchronous", "drawn" if row.drawn else "given",
        *(f"{np.mean(share):.1%} ({min(share):.0%})" for share in shares),
        f"{row.missed:.2f}", f"{row.missed_at_busy_steps:.2f}", f"{row.kib:.0f}",
    )  # fmt: skip


def _plot(rows: Sequence[Record], cosines: Cosines, title: str, path: Path) -> None:
    figure = Figure((14, 3.8), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 4)
    size = max(row.block_size for row in rows)
    plain = [row for row in rows if row.block_size == size and row.lagged and not row.drawn]
    longest = [row for row in plain if row.length == rows[-1].length]
    colours = {row.share: COLOURS(number) for number, row in enumerate(longest)}
    for row in longest:
        style = {"color": colours[row.share], "marker": ".", "linewidth": 1}
        default = row.hits[POOL_FACTORS[0]]
        axes[0].plot(default, label=f"{row.share:.1%} of the blocks", **style)
        pools = [row.repeated, *row.hits.values()]
        axes[1].plot([1, *POOL_FACTORS], [np.mean(share) for share in pools], **style)
        own = [one for one in plain if one.share == row.share]
        hits = [np.mean(one.hits[POOL_FACTORS[0]]) for one in own]
        axes[2].plot([one.length for one in own], hits, **style)
    axes[0].legend(fontsize=8, frameon=False)
    axes[2].set_xscale("log", base=2)
    for name, values in cosines._asdict().items():
        axes[3].plot(values, label=name, linewidth=1)
    axes[3].legend(fontsize=8, frameon=False)
    _name(axes[0], f"hits, {rows[-1].length} tokens", "sparse layer")
    _name(axes[1], "hits by size of the pool (1: last list)", "slots for each block of a list")
    _name(axes[2], "hits by length", "tokens")
    _name(axes[3], "cosine of successive tokens", "layer")
    figure.suptitle(f"Blocks that the pool holds already: {title}", fontsize=11)
    figure.savefig(path)


def _name(axis: Axes, title: str, label: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
