"""Tables, JSON and a chart of cache sizes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from asa_jax.decoding.cache_bytes import CacheReport, KindBytes

# By name the reports of models that stand side by side, one a length; 'nsa' and 'full' are there.
Reports = Mapping[str, Sequence[CacheReport]]
DPI = 130


def allocated_table(title: str, reports: Reports) -> Table:
    """The cache as decoding allocates it, of every model at every length."""

    def cells(report: CacheReport, nsa: KindBytes, full: KindBytes) -> list[str]:
        size = report.whole.allocated
        each = 1 / (report.length * report.whole.num_layers)
        return [
            name_bytes(size.total),
            f"{size.total * each:.1f}",
            f"{size.total / nsa.allocated.total:.1%}",
            f"{size.total / full.allocated.total:.1%}",
            f"{(size.total - size.without_rope_keys) * each:.1f}",
            f"{(size.total - size.without_compression) * each:.1f}",
            name_bytes(size.lists),
        ]

    headings = (
        "a sequence", "bytes a token\nand layer", "of\nNSA", "of\nGQA", "of which\nRoPE keys",
        "of which\nsummaries", "block lists\nbeside",
    )  # fmt: skip
    return _table(f"{title}: KV cache as allocated", headings, reports, cells)


def unevicted_table(title: str, reports: Reports) -> Table:
    """The cache were windows as long as the sequence, whole and without some parts."""

    def cells(report: CacheReport, nsa: KindBytes, full: KindBytes) -> list[str]:
        size = report.whole.unevicted
        each = 1 / (report.length * report.whole.num_layers)
        parts = (size.total, size.without_compression, size.without_rope_keys, size.tokens)
        return [
            f"{size.total / nsa.unevicted.total:.1%}",
            *(f"{part * each:.1f} {part / full.unevicted.total:>8.2%}" for part in parts),
        ]

    headings = (
        "of\nNSA", "bytes a token\nand layer, of GQA", "without\nsummaries",
        "without\nRoPE keys", "without\nboth",
    )  # fmt: skip
    return _table(f"{title}: KV cache if nothing were evicted", headings, reports, cells)


def _table(
    title: str,
    headings: Sequence[str],
    reports: Reports,
    cells: Callable[[CacheReport, KindBytes, KindBytes], list[str]],
) -> Table:
    """A section for each length, a row for each model; `cells` of its report, NSA's and GQA's."""
    table = _empty_table(title, ("tokens", "model", *headings))
    for same_length in zip(*reports.values(), strict=True):
        by_name = dict(zip(reports, same_length, strict=True))
        baselines = by_name["nsa"].whole, by_name["full"].whole
        for name, report in by_name.items():
            table.add_row(name_tokens(report.length), name, *cells(report, *baselines))
        table.add_section()
    return table


def kind_table(title: str, reports: Reports) -> Table:
    """Bytes a token of one layer of every kind, as allocated."""
    lengths = [name_tokens(report.length) for report in next(iter(reports.values()))]
    table = _empty_table(
        f"{title}: bytes a token of one layer, as allocated", ("layers", "model", *lengths)
    )
    for name, by_length in reports.items():
        for kind in by_length[0].kinds:
            sizes = [(report.kinds[kind], report.length) for report in by_length]
            each = [f"{s.allocated.total / s.num_layers / length:.1f}" for s, length in sizes]
            table.add_row(f"{sizes[0][0].num_layers} {kind}", name, *each)
    return table


def _empty_table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    return table


def to_json(comparisons: Mapping[str, Reports]) -> list[dict[str, Any]]:
    """All numbers, in bytes: an object for each model and length."""
    return [
        {
            "comparison": title,
            "model": name,
            "length": report.length,
            "all_layers": _kind_json(report.whole),
            "kinds": {kind: _kind_json(size) for kind, size in report.kinds.items()},
        }
        for title, reports in comparisons.items()
        for name, by_length in reports.items()
        for report in by_length
    ]


def _kind_json(size: KindBytes) -> dict[str, Any]:
    return {
        "layers": size.num_layers,
        "allocated": size.allocated._asdict(),
        "unevicted": size.unevicted._asdict(),
    }


def plot_lengths(comparisons: Mapping[str, Reports], path: Path) -> None:
    """Draws the bytes of a sequence, as allocated, by its length: a panel for each comparison."""
    figure = Figure((0.8 + 4.2 * len(comparisons), 4), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(comparisons), squeeze=False, sharey=True)[0]
    for axis, (title, reports) in zip(panels, comparisons.items(), strict=True):
        _plot_panel(axis, title, reports)
    panels[0].set_ylabel("KV cache of a sequence, as allocated")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png")


def _plot_panel(axis: Axes, title: str, reports: Reports) -> None:
    for name, by_length in reports.items():
        lengths = [report.length for report in by_length]
        totals = [report.whole.allocated.total for report in by_length]
        axis.plot(lengths, totals, marker="o", markersize=3, linewidth=1.8, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda tokens, _: name_tokens(tokens))
    axis.yaxis.set_major_formatter(lambda size, _: name_bytes(size))
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("tokens")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def name_tokens(count: float) -> str:
    """65536 as 64k."""
    return _with_unit(count, ("", "k", "M", "G"))


def name_bytes(count: float) -> str:
    """65536 as 64 KiB."""
    return _with_unit(count, (" B", " KiB", " MiB", " GiB", " TiB"))


def _with_unit(count: float, units: Sequence[str]) -> str:
    """A count in the largest of the units, powers of 1024, that leaves at least 1 of it."""
    index = 0
    while count >= 1024 and index < len(units) - 1:
        count /= 1024
        index += 1
    return f"{count:.4g}{units[index]}"
