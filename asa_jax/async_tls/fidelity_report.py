"""The report of `fidelity`: JSON with everything, Markdown with the tables, a picture."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asa_jax.async_tls.fidelity_options import Options
from asa_jax.async_tls.fidelity_plots import plot_fidelity
from asa_jax.async_tls.fidelity_records import Record
from asa_jax.async_tls.fidelity_summary import (
    FULL,
    Perplexity,
    jump_rows,
    perplexities,
    targets,
    task_rows,
)
from asa_jax.evaluation.report import versions


def write_report(options: Options, header: dict[str, Any], records: Sequence[Record]) -> list[Path]:
    """Writes OUTPUT.json, .md and .png.

    Args:
        options: of the command.
        header: what was measured on what.
        records: all of them.

    Returns:
        The files.
    """
    rows, tasks, jumps = perplexities(records), task_rows(records), jump_rows(records)
    header = {**header, "versions": versions()}
    settings = {
        "block_size": options.settings.sizes.block_size,
        "num_channels": options.settings.sizes.num_channels,
        "num_dense_layers": options.settings.num_dense_layers,
        "candidates": options.candidates,
        "texts": [path.name for path in options.text],
    }
    paths = [options.output.with_name(options.output.name + s) for s in (".json", ".md", ".png")]
    values = {
        **header, "settings": settings, "perplexity": [dataclasses.asdict(row) for row in rows],
        "tasks": tasks, "jumps": jumps, "targets": targets(rows),
    }  # fmt: skip
    paths[0].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(_markdown(header, settings, rows, tasks, jumps), encoding="utf-8")
    plot_fidelity(rows, jumps, header["model"], paths[2])
    return paths


def _markdown(
    header: dict[str, Any],
    settings: dict[str, Any],
    rows: Sequence[Perplexity],
    tasks: Sequence[dict[str, Any]],
    jumps: Sequence[dict[str, Any]],
) -> str:
    parts = [
        f"# Sparse decoding against full attention: {header['model']}, step {header['step']}\n",
        f"`{header['command']}`\n",
        f"{header['date']}, {header['devices']}, "
        + ", ".join(f"{name} {version}" for name, version in header["versions"].items())
        + f"; {header['contexts']} of {header['contexts_wanted']} contexts.\n",
        f"Blocks of {settings['block_size']}; {settings['num_channels']} channels; the first "
        f"{settings['num_dense_layers']} layers dense. Budgets are tokens of a key head; the first "
        "block, the tail and the one before it come on top for every decoder. `x4`: level 1 keeps "
        "4 candidates for each token of the budget; where that would be all, there is no number, "
        "because both forms are `double_sparsity` then.\n",
        *_perplexity_tables(rows),
        *_layer_tables(rows),
        *_task_tables(tasks),
        *_jump_tables(jumps),
    ]
    return "\n".join(parts)


def _perplexity_tables(rows: Sequence[Perplexity]) -> list[str]:
    parts = [
        "## Perplexity\n",
        "Change from full attention on the same tokens, +- standard error.\n",
    ]
    for length in _distinct(rows, "length"):
        own = [row for row in rows if row.length == length]
        (full,) = (row for row in own if row.decoder == FULL)
        title = f"{length} tokens; full: {full.perplexity:.3f} over {full.tokens} tokens"
        parts.append(_table(title, own, lambda r: f"{r.change:+.2%} +- {r.change_error:.2%}"))
    return parts


def _layer_tables(rows: Sequence[Perplexity]) -> list[str]:
    parts = [
        "## Attention weight kept, and best tokens kept\n",
        "Means over sparse layers, with the lowest layer; single layers are in the JSON.\n",
    ]
    for length in _distinct(rows, "length"):
        own = [row for row in rows if row.length == length]
        for what in ("mass", "recall"):
            parts.append(_table(f"{what}, {length} tokens", own, lambda r, w=what: _mean(r, w)))
    return parts


def _mean(row: Perplexity, what: str) -> str:
    values = getattr(row, what)
    return f"{sum(values) / len(values):.3f} ({min(values):.2f})"


def _task_tables(tasks: Sequence[dict[str, Any]]) -> list[str]:
    if not tasks:
        return []
    parts = ["## Questions\n", "Answers that greedy decoding gives, and nats a token of all.\n"]
    for task in dict.fromkeys(row["task"] for row in tasks):
        own = [row for row in tasks if row["task"] == task]
        (full,) = (row for row in own if row["decoder"] == FULL)
        title = (
            f"{task}, {full['length']} tokens; full: {full['right']} of {full['answers']}, "
            f"{full['nats']:.3f}"
        )
        cell = "{right}, {nats:.3f}"
        parts.append(_table(title, own, lambda r, c=cell: c.format(**r)))
    return parts


def _jump_tables(jumps: Sequence[dict[str, Any]]) -> list[str]:
    if not jumps:
        return []
    (full,) = (row for row in jumps if row["decoder"] == FULL)
    places = (slice(1, 4), slice(4, None))

    def cell(row: dict[str, Any]) -> str:
        means = (sum(row["nats"][p]) / len(row["nats"][p]) for p in places)
        return ", ".join(f"{mean:.3f}" for mean in means)

    size = len(full["nats"])
    return [
        "## Topic jumps\n",
        f"Snippets of {size} earlier tokens, each from another place of the text: nats a token of "
        f"their tokens 2 to 4, and of 5 to {size}.\n",
        _table(f"{full['length']} tokens; full: {cell(full)}", jumps, cell),
    ]


def _table(title: str, rows: Sequence[Any], cell: Any) -> str:
    """Decoders by budgets."""
    sparse = [row for row in rows if _field(row, "decoder") != FULL]
    budgets = sorted({_field(row, "budget") for row in sparse})
    lines = [
        f"| {title} | " + " | ".join(map(str, budgets)) + " |",
        "|---" * (1 + len(budgets)) + "|",
    ]
    for decoder in dict.fromkeys(_field(row, "decoder") for row in sparse):
        cells = {_field(r, "budget"): cell(r) for r in sparse if _field(r, "decoder") == decoder}
        lines.append(f"| {decoder} | " + " | ".join(cells.get(b, "") for b in budgets) + " |")
    return "\n".join(lines) + "\n"


def _field(row: Any, name: str) -> Any:
    return row[name] if isinstance(row, dict) else getattr(row, name)


def _distinct(rows: Sequence[Any], name: str) -> list[Any]:
    return sorted({_field(row, name) for row in rows})
