"""Reads documents, one at a time, from text, JSONL and Parquet files."""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from asa_jax.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_PARQUET_ROWS = 256  # documents decoded at a time


class Document(NamedTuple):
    """One document and how many bytes of its file are read with it."""

    text: str
    bytes_read: int


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files matched by paths or globs (`**` crosses folders), sorted, each once.

    Raises:
        DataError: a pattern matches nothing, or a file is of an unknown kind.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file()]
        if not matches:
            raise DataError(f"{pattern}: no such file")
        found.update(matches)
    for path in sorted(found):
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file, expected {', '.join(SUFFIXES)}")
    return sorted(found)


def read_documents(path: Path, text_field: str) -> Iterator[Document]:
    """Reads one file: a .txt is one document, the others hold one a record.

    Args:
        path: file to read.
        text_field: name of the field or column with the text.

    Raises:
        DataError: it cannot be read; names the file and the byte, line or row.
    """
    try:
        if path.name.endswith(".txt"):
            yield _read_text(path)
        elif path.name.endswith(".parquet"):
            yield from _read_parquet(path, text_field)
        else:
            yield from _read_jsonl(path, text_field)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _read_text(path: Path) -> Document:
    content = path.read_bytes()
    return Document(_decode(content, str(path), 0).removeprefix("\ufeff"), len(content))


def _decode(content: bytes, where: str, offset: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: invalid UTF-8 at byte {offset + error.start} "
            f"(0x{content[error.start]:02x}); convert the text to UTF-8"
        ) from None


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with open(path, "rb") as raw:
        lines: Any = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
        offset = 0
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            text = _decode(line, where, offset)
            offset += len(line)
            if text.strip():
                yield Document(_json_text(text, where, text_field), raw.tell())


def _json_text(line: str, where: str, text_field: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 ", "")  # of this one line
        raise DataError(f"{where}: broken JSON ({reason})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if text_field not in record:
        raise DataError(f"{where}: {_missing_field(text_field, list(record))}")
    return _checked_text(record[text_field], where, text_field)


def _missing_field(text_field: str, present: Sequence[str]) -> str:
    names = ", ".join(present[:8]) or "nothing"
    return f"no field {text_field!r} (it has {names}); name the text with --text-field"


def _checked_text(value: object, where: str, text_field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {text_field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise DataError(
            f"{where}: field {text_field!r} holds half a surrogate pair at character {error.start}"
        ) from None
    return value


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    with pa.parquet.ParquetFile(path) as file:
        if text_field not in file.schema_arrow.names:
            raise DataError(f"{path}: {_missing_field(text_field, file.schema_arrow.names)}")
        size, rows = path.stat().st_size, max(1, file.metadata.num_rows)
        row = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                text = _checked_text(value, f"{path} row {row}", text_field)
                yield Document(text, size * row // rows)
