"""Tables and figures of a comparison, as far as it has been measured.

    python -m experiments.report runs/comparison --output=docs/comparison.md

Writes what was measured between two marks in the page, and leaves the rest of the page as it is; a
page that does not exist is made. The figures and all results in one JSON file go to `results/`
beside the page. What has not been measured is shown as missing.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # shapes alone

from asa_jax.errors import DataError, exit_on_user_error
from experiments import figures
from experiments.measured import FAR_TOKENS, Comparison, Run, load_comparison
from experiments.power_law import fit_power_law
from pallas_kernels.measurement import markdown_table

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOTHING = "-"
SCALED_PARAMETERS = 302e6  # of the 340M models without their embeddings


def quality_table(data: Comparison) -> list[str]:
    """A row for each model: loss by part, copying, retrieval."""
    parts = data.parts()
    tasks = list(dict.fromkeys(task for run in data.runs for task in run.exact_matches()))
    header = ["model", "parameters", "tokens", "seeds", "learning rate", "loss"]
    header += [f"{part}, bits/byte" for part in parts]
    header += [f"copied from {FAR_TOKENS}+", *(task.replace("_", " ") for task in tasks)]
    return markdown_table(header, [_quality_row(data, m, parts, tasks) for m in data.models])


def _quality_row(
    data: Comparison, model: str, parts: Sequence[str], tasks: Sequence[str]
) -> list[str]:
    runs = [run for run in data.of(model) if "train" in run.stages]
    if not runs:
        return [model, *[NOTHING] * (6 + len(parts) + len(tasks))]
    train = runs[0].stages["train"]
    rate = train["config"]["optimizer"]["learning_rate"]
    planned = len(data.of(model))
    return [
        model, f"{train['parameters'] / 1e6:.1f}M", f"{train['tokens'] / 1e6:.1f}M",
        f"{len(runs)} of {planned}", f"{rate:g}",
        _mean([data.mixed_loss(run) for run in runs if run.bits_per_byte()], "{:.4f}"),
        *(_mean(data.values(model, part).values(), "{:.4f}") for part in parts),
        _mean((run.far_copies() for run in runs), "{:.1%}"),
        *(_mean((run.exact_matches().get(task) for run in runs), "{:.1%}") for task in tasks),
    ]  # fmt: skip


def _mean(values: Iterable[float | None], form: str) -> str:
    """The mean, with the standard deviation where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    text = form.format(statistics.fmean(known))
    return f"{text} ± {form.format(statistics.stdev(known))}" if len(known) > 1 else text


def cost_table(data: Comparison) -> list[str]:
    """A row for each model: speed of training, memory, cache, decoding."""
    lengths = data.grid["decode_lengths"] or [8192]
    header = ["model", "tokens/s in training", "peak GiB"]
    header += [f"cache at {length:,}, kB/token" for length in lengths]
    header += [f"decoding at {length:,}, ms/token" for length in lengths]
    rows = []
    for model in data.models:
        speed = data.first(model, "speed") or {}
        decode = (data.first(model, "decode") or {}).get("seconds_per_token", {})
        caches = [data.cache_bytes(model, length) for length in lengths]
        rows.append(
            [
                model, _number(speed.get("tokens_per_second"), "{:,.0f}"),
                _number(speed.get("memory_bytes"), "{:.1f}", 2**-30),
                *(_number(size, "{:.2f}", 1e-3) for size in caches),
                *(_number(decode.get(str(length)), "{:.2f}", 1e3) for length in lengths),
            ]
        )  # fmt: skip
    return markdown_table(header, rows)


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return NOTHING if value is None else form.format(value * factor)


def difference_table(data: Comparison) -> list[str]:
    """Paired differences from the baseline by part, with what they say."""
    parts = data.parts()
    found = {part: data.differences(part) for part in parts}
    models = [m for m in data.models if any(m in of_part for of_part in found.values())]
    rows = []
    for model in models:
        row = [model]
        for part in parts:
            difference = found[part].get(model)
            if difference is None:
                row.append(NOTHING)
                continue
            spread = "" if difference.spread is None else f" ± {difference.spread:.4f}"
            row.append(f"{difference.mean:+.4f}{spread} ({difference.verdict})")
        rows.append([*row, str(max(d[model].seeds for d in found.values() if model in d))])
    return markdown_table([f"minus {data.baseline}", *parts, "seeds"], rows) if rows else []


def copying_table(data: Comparison) -> list[str]:
    """Exact copies by distance, first seed of each model."""
    found = {m: (data.first(m, "copying") or {}).get("groups", []) for m in data.models}
    bounds = {tuple(g["distance"] or (-1, 0)): g for groups in found.values() for g in groups}
    if not bounds:
        return []
    header = ["model", *(_distance(bounds[key]) for key in sorted(bounds))]
    rows = []
    for model, groups in found.items():
        by_bound = {tuple(group["distance"] or (-1, 0)): group for group in groups}
        cells = [by_bound.get(key) for key in sorted(bounds)]
        rows.append([model, *(NOTHING if c is None else f"{c['exact']:.1%}" for c in cells)])
    return markdown_table(header, rows)


def selection_table(data: Comparison) -> list[str]:
    """What lists of blocks share and how far they reach, means over parts and layers."""
    rows = []
    for model in data.models:
        found = (data.first(model, "selection") or {}).get("sources", [])
        layers = [layer for source in found for layer in source["layers"]]
        if layers:
            means = {name: statistics.fmean(layer[name] for layer in layers) for name in layers[0]}
            rows.append(
                [
                    model, f"{means['repeated']:.1%}", f"{means['distinct']:.1%}",
                    f"{means['beyond_window']:.1%}", f"{means['median_distance']:,.0f}",
                ]
            )  # fmt: skip
    header = [
        "model", "of a list also in the one before", "different blocks of 16 lists in a row",
        "beyond the window", "median distance, tokens",
    ]  # fmt: skip
    return markdown_table(header, rows) if rows else []


def _distance(group: dict[str, Any]) -> str:
    name = "never seen" if group["distance"] is None else "{}-{}".format(*group["distance"])
    return f"{name} (n = {group['count']})"


def choice_table(data: Comparison) -> list[str]:
    """Accuracies of multiple-choice files; models this small are near chance."""
    found = {
        model: {
            choice["task"]: choice
            for choice in (data.first(model, "choices") or {}).get("choices", [])
        }
        for model in data.models
    }
    tasks = list(dict.fromkeys(task for choices in found.values() for task in choices))
    rows = [
        [model, *(_choice(choices.get(task)) for task in tasks)] for model, choices in found.items()
    ]
    return markdown_table(["model", *tasks], rows) if tasks else []


def _choice(choice: dict[str, Any] | None) -> str:
    if choice is None:
        return NOTHING
    chance = "" if choice["chance"] is None else f" ({choice['chance']:.1%})"
    return f"{choice['accuracy']:.1%} ± {choice['accuracy_error']:.1%}{chance}"


def scaling_lines(data: Comparison) -> list[str]:
    """The power law of each arm that has been trained in three sizes."""
    lines = []
    for arm, points in data.sizes().items():
        sizes, losses = zip(*points, strict=True)
        if len(set(sizes)) < 3:
            continue
        law = fit_power_law(sizes, losses)
        loss, error = law.predict(SCALED_PARAMETERS)
        lines.append(
            f"- {arm}: loss ~ N^-{law.exponent:.3f} (± {law.exponent_error:.3f}) over "
            f"{len(points)} runs; {loss:.3f} ± {error:.3f} nats a token expected of "
            f"{SCALED_PARAMETERS / 1e6:.0f}M parameters, at as many tokens a parameter."
        )
    return lines


def missing_lines(data: Comparison) -> list[str]:
    """One line for each stage that some runs lack."""
    lacking: dict[str, list[str]] = {}
    for run, stage in data.missing():
        lacking.setdefault(stage, []).append(run)
    return [f"- {stage}: {', '.join(runs)}" for stage, runs in lacking.items()]


def draw_all(data: Comparison, folder: Path, stem: str) -> list[str]:
    """Draws the figures into a folder; returns a line of the page for each."""
    length = (data.grid["decode_lengths"] or [8192])[0]
    drawings = {
        "losses": ("Training loss", figures.draw_losses),
        "positions": ("Bits per byte by position", figures.draw_positions),
        "needles": ("Retrieval by length and depth", figures.draw_needles),
        "cache": (
            "Loss against bytes of the cache",
            lambda data, path: figures.draw_cache(data, length, path),
        ),
    }
    lines = []
    for name, (title, draw) in drawings.items():
        path = folder / f"{stem}_{name}.png"
        done = draw(data, path)
        lines += [f"![{title}]({folder.name}/{path.name})" if done else f"{title}: not measured."]
        lines.append("")
    return lines


def page(data: Comparison, pictures: Sequence[str]) -> str:
    """Everything that was measured, as Markdown."""
    devices = {
        result["device"]
        for run in data.runs
        for name in ("speed", "decode")
        if (result := run.stages.get(name))
    }
    sections = {
        "": [f"Timed on: {', '.join(sorted(devices)) or 'nothing yet'}.", "", *quality_table(data)],
        "Paired differences, bits per byte": difference_table(data),
        "Cost": cost_table(data),
        "Identifiers copied exactly, by distance in tokens": copying_table(data),
        "Lists of selected blocks": selection_table(data),
        "Figures": list(pictures),
        "Multiple choice, accuracy (chance)": choice_table(data),
        "Power law": scaling_lines(data),
        "Missing": missing_lines(data),
    }
    lines = []
    for title, content in sections.items():
        if content:
            lines += ([f"### {title}", ""] if title else []) + [*content, ""]
    return "\n".join(lines).strip()


def insert(path: Path, text: str) -> None:
    """Puts the text between the marks of a page, or makes a page of it.

    Raises:
        DataError: the page has no marks.
    """
    whole = path.read_text() if path.exists() else f"# Comparison\n\n{BEGIN}\n{END}\n"
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{path}: holds no lines '{BEGIN}' and '{END}' to write between")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def raw_results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All results, as they are committed."""
    return [{"model": run.model, "seed": run.seed, "stages": run.stages} for run in runs]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report")
    parser.add_argument("comparison", type=Path, help="the --output of experiments.compare")
    parser.add_argument("--output", type=Path, required=True, help="the page, such as a/b.md")
    options = parser.parse_args(arguments)
    folder, stem = options.output.parent / "results", options.output.stem
    with exit_on_user_error():
        data = load_comparison(options.comparison)
        folder.mkdir(parents=True, exist_ok=True)
        insert(options.output, page(data, draw_all(data, folder, stem)))
        raw = {"grid": data.grid, "runs": raw_results(data.runs)}
        (folder / f"{stem}.json").write_text(json.dumps(raw) + "\n")
    print(f"{options.output}, {folder}/{stem}.json and figures")


if __name__ == "__main__":
    main()
