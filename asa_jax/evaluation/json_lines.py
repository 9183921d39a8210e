"""Reads JSONL files of evaluation sets and checks the fields of each line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asa_jax.errors import DataError


class Line:
    """One JSON object of a file; a wrong field is an error that names file, line and field."""

    def __init__(self, where: str, fields: dict[str, Any]) -> None:
        self.where = where
        self.fields = fields

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def text(self, name: str) -> str:
        """A field that must be text and not empty."""
        value = self._get(name)
        self.check(_is_text(value), name, "text that is not empty")
        return value

    def texts(self, name: str) -> list[str]:
        """A field that must be a list of at least two texts."""
        value = self._get(name)
        good = isinstance(value, list) and all(map(_is_text, value))
        self.check(good and len(value) > 1, name, "a list of two texts or more, none empty")
        return value

    def index(self, name: str, size: int) -> int:
        """A field that must be an index into a list of `size`."""
        value = self._get(name)
        self.check(type(value) is int and 0 <= value < size, name, f"a number from 0 to {size - 1}")
        return value

    def pairs(self, name: str) -> list[tuple[str, str]]:
        """A field that must be a list of pairs of texts."""
        value = self._get(name)
        good = isinstance(value, list) and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(item, str) for item in pair)
            for pair in value
        )
        self.check(good and bool(value), name, "a list of pairs of texts")
        return [(key, text) for key, text in value]

    def check(self, condition: bool, name: str, requirement: str) -> None:
        """Raises a DataError that names the field unless `condition` holds."""
        if not condition:
            value = repr(self.fields.get(name))
            shown = value if len(value) <= 60 else f"{value[:57]}..."
            raise DataError(f"{self.where}: field {name!r} = {shown}: must be {requirement}")

    def _get(self, name: str) -> Any:
        if name not in self.fields:
            raise DataError(
                f"{self.where}: no field {name!r} (it has {', '.join(self.fields) or 'nothing'})"
            )
        return self.fields[name]


def read_lines(path: Path) -> Iterator[Line]:
    """Reads a .jsonl or .jsonl.gz file, leaving out blank lines.

    Raises:
        DataError: it cannot be read, holds nothing, or a line is no JSON object in UTF-8.
    """
    empty = True
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, content in enumerate(file, start=1):
                if content.strip():
                    empty = False
                    yield _parse(content, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if empty:
        raise DataError(f"{path}: is empty; give a file with one JSON object a line")


def _parse(content: bytes, where: str) -> Line:
    try:
        fields = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: invalid UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: broken JSON ({error})") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise DataError(f"{where}: holds half a surrogate pair") from None
    return Line(where, fields)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
