"""The chart of benchmarks that measure at several lengths of context."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

PER_MILLISECOND = {"milliseconds": 1.0, "microseconds": 1e3}


def plot_over_context(
    records: list[dict[str, Any]],
    about: dict[str, str],
    path: Path,
    *,
    line: str,
    panel: Callable[[dict[str, Any]], str],
    unit: Literal["milliseconds", "microseconds"],
) -> None:
    """Draws time over context with the floor dotted.

    Args:
      records: What was measured; those without a time are left out.
      about: Of `describe_setting`.
      path: Of the picture.
      line: Field that all points of a line share.
      panel: Title of the panel that a record belongs to.
      unit: Of the times.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scale = PER_MILLISECOND[unit]
    timed = sorted((r for r in records if "milliseconds" in r), key=lambda r: r["batch"])
    titles = list(dict.fromkeys(map(panel, timed)))
    names = list(dict.fromkeys(record[line] for record in records if line in record))
    figure, panels = pyplot.subplots(
        1, max(1, len(titles)), figsize=(4.5 * max(1, len(titles)) + 3, 5), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    legend = {}
    for axes, title in zip(panels[0], titles, strict=False):
        for number, name in enumerate(names):
            points = sorted(
                (r["context"], scale * r["milliseconds"], scale * r["floor_milliseconds"])
                for r in timed
                if (panel(r), r[line]) == (title, name)
            )
            if points:
                contexts, times, floors = zip(*points, strict=True)
                (legend[name],) = axes.plot(contexts, times, marker="o", color=f"C{number}")
                axes.plot(contexts, floors, linestyle=":", color=f"C{number}")
        axes.set(yscale="log", xlabel="tokens of context")
        axes.set_xscale("log", base=2)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    panels[0][0].set(ylabel=f"{unit} (dotted: floor)")
    figure.legend(legend.values(), legend.keys(), fontsize=8, loc="outside right center")
    figure.suptitle(f"{about.get('device')}, jax {about.get('jax')}, {about['date']}")
    figure.savefig(path, dpi=120)
