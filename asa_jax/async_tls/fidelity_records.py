"""What `fidelity` measured so far, in a file of JSON lines that outlives an interrupt."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from asa_jax.async_tls.fidelity_options import Options
from asa_jax.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One context decoded by one decoder at one budget.

    Attributes:
        context: its name.
        kind: of the context.
        length: of the context.
        decoder: that chose.
        budget: tokens kept; 0 for full attention.
        nats: of the predicted tokens.
        answers: of a task, nats, whether greedy decoding gives it, and tokens of each answer.
        mass: of each sparse layer, attention weight kept.
        recall: of each sparse layer, share of the best tokens kept.
    """

    context: str
    kind: str
    length: int
    decoder: str
    budget: int
    nats: list[float]
    answers: list[tuple[float, bool, int]]
    mass: list[float]
    recall: list[float]


class Records:
    """All records of a command, read from its file and appended to it.

    Attributes:
        all: in the order in which they were measured.
    """

    def __init__(self, options: Options, fingerprint: str) -> None:
        """Reads what an interrupted command left.

        Args:
            options: of the command; others than those of the file are refused.
            fingerprint: of the model.

        Raises:
            DataError: the file is of other settings.
        """
        self._path = options.output.with_name(f"{options.output.name}.partial.jsonl")
        self.all: list[Record] = []
        settings = {"settings": _digest(options, fingerprint)}
        lines = _read_lines(self._path)
        if lines and lines[0] != settings:
            raise DataError(
                f"{self._path}: was begun with other settings, text or weights; delete it or "
                "give another --output"
            )
        self.all = [Record(**line) for line in lines[1:]]
        with self._path.open("w", encoding="utf-8") as file:  # without a line that was cut off
            for line in (settings, *map(dataclasses.asdict, self.all)):
                file.write(json.dumps(line) + "\n")

    def has(self, context: str, decoder: str, budget: int) -> bool:
        """Whether this was measured."""
        return any((r.context, r.decoder, r.budget) == (context, decoder, budget) for r in self.all)

    def add(self, record: Record) -> None:
        """Keeps a record, also if the process ends now."""
        self.all.append(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")

    def delete(self) -> None:
        """Removes the file."""
        self._path.unlink()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _digest(options: Options, fingerprint: str) -> str:
    fields = {
        field.name: str(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.name not in ("tokenizer", "workdir", "output")
    }
    digest = hashlib.sha256(json.dumps([fields, fingerprint], sort_keys=True).encode())
    for path in (*options.text, options.filler, options.channels):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
