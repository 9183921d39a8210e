"""What the records of `fidelity` amount to."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from asa_jax.async_tls.fidelity_records import Record
from asa_jax.async_tls.fidelity_texts import JUMPS, SNIPPET_TOKENS, TASKS, TEXT

FULL = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """One decoder at one budget on all contexts of a length.

    Attributes:
        length: of the contexts.
        decoder: that chose.
        budget: tokens kept; 0 for full attention.
        tokens: predicted.
        perplexity: of a token.
        change: relative to full attention on the same tokens, and its standard error.
        change_error: tokens counted as independent.
        mass: of each sparse layer, mean attention weight kept.
        recall: of each sparse layer, mean share of the best tokens kept.
    """

    length: int
    decoder: str
    budget: int
    tokens: int
    perplexity: float
    change: float
    change_error: float
    mass: list[float]
    recall: list[float]


def perplexities(records: Sequence[Record]) -> list[Perplexity]:
    """A row for each length, decoder and budget."""
    texts = [record for record in records if record.kind == TEXT]
    full = {record.context: np.array(record.nats) for record in texts if record.decoder == FULL}
    rows = []
    for (length, decoder, budget), group in _grouped(
        texts, lambda record: (record.length, record.decoder, record.budget)
    ).items():
        nats = np.concatenate([record.nats for record in group])
        more = nats - np.concatenate([full[record.context] for record in group])
        change = math.expm1(more.mean())
        rows.append(
            Perplexity(
                length=length,
                decoder=decoder,
                budget=budget,
                tokens=len(nats),
                perplexity=math.exp(nats.mean()),
                change=change,
                change_error=float((1 + change) * more.std() / len(more) ** 0.5),
                mass=np.mean([record.mass for record in group], axis=0).round(4).tolist(),
                recall=np.mean([record.recall for record in group], axis=0).round(4).tolist(),
            )
        )
    return rows


def task_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Answers given and their nats a token, for each task, decoder and budget."""
    rows = []
    tasks = [record for record in records if record.kind in TASKS]
    for (task, length, decoder, budget), group in _grouped(
        tasks, lambda record: (record.kind, record.length, record.decoder, record.budget)
    ).items():
        answers = [answer for record in group for answer in record.answers]
        nats, right, tokens = zip(*answers, strict=True)
        rows.append(
            {"task": task, "length": length, "decoder": decoder, "budget": budget,
             "samples": len(group), "answers": len(answers), "right": sum(right),
             "nats": sum(nats) / sum(tokens)}
        )  # fmt: skip
    return rows


def jump_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Nats by place in a snippet, for each decoder and budget."""
    jumps = [record for record in records if record.kind == JUMPS]
    return [
        {"length": record.length, "decoder": record.decoder, "budget": record.budget,
         "nats": np.reshape(record.nats, (-1, SNIPPET_TOKENS)).mean(0).round(4).tolist()}
        for record in jumps
    ]  # fmt: skip


def targets(rows: Sequence[Perplexity]) -> list[dict[str, Any]]:
    """What issue 6 asks of perplexity, and what was seen, for each length."""
    found = []
    by_place = {(row.length, row.decoder, row.budget): row for row in rows}
    for row in rows:
        if row.decoder in (FULL, "quest", "oracle_topk"):
            continue
        limit = {512: 0.03, 1024: 0.01}.get(row.budget)
        quest = by_place.get((row.length, "quest", row.budget))
        sparsity = by_place.get((row.length, "double_sparsity", row.budget))
        found.append(
            {"length": row.length, "decoder": row.decoder, "budget": row.budget,
             "change": row.change, "limit": limit,
             "within_limit": None if limit is None else row.change <= limit,
             "over_quest": None if quest is None else row.change - quest.change,
             "over_double_sparsity": None if sparsity is None else row.change - sparsity.change}
        )  # fmt: skip
    return found


def _grouped(
    records: Sequence[Record], key: Callable[[Record], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups
