"""Reads documents, one at a time, from text, JSONL and Parquet files, here or on the hub."""

import contextlib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from asa_jax.data.hub import find_hub_files, hub_errors, is_hub_name, open_hub_file
from asa_jax.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_PARQUET_ROWS = 256  # documents decoded at a time
_READ_BYTES = 2**20


class Document(NamedTuple):
    """One document and how many bytes of its file are read with it."""

    text: str
    bytes_read: int


class InputFile(NamedTuple):
    """A file to read; `version` changes with its content.

    Attributes:
        name: its path, or hf://...
        size: in bytes.
        version: time of last change in nanoseconds, or the hub's name of the content.
    """

    name: str
    size: int
    version: int | str


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """Files matched by paths, globs and hf:// patterns, sorted by name, each once.

    Raises:
        DataError: a pattern matches nothing, a file is of an unknown kind, or the hub is away.
    """
    hub = [InputFile(*file) for p in patterns if is_hub_name(p) for file in find_hub_files(p)]
    _check_suffixes([file.name for file in hub])
    local = [
        InputFile(str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for path in find_files([p for p in patterns if not is_hub_name(p)])
    ]
    return sorted({*hub, *local})


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
    _check_suffixes(sorted(map(str, found)))
    return sorted(found)


def _check_suffixes(names: Sequence[str]) -> None:
    for name in names:
        if not name.endswith(SUFFIXES):
            raise DataError(f"{name}: unknown kind of file, expected {', '.join(SUFFIXES)}")


def read_documents(path: str | Path, text_field: str) -> Iterator[Document]:
    """Reads one file: a .txt is one document, the others hold one a record.

    Args:
        path: file to read, or its hf:// name.
        text_field: name of the field or column with the text.

    Raises:
        DataError: it cannot be read; names the file and the byte, line or row.
    """
    name = str(path)
    on_hub = is_hub_name(name)
    try:
        with (
            hub_errors(name) if on_hub else contextlib.nullcontext(),
            open_hub_file(name) if on_hub else open(name, "rb") as file,
        ):
            if name.endswith(".txt"):
                yield _read_text(file, name)
            elif name.endswith(".parquet"):
                yield from _read_parquet(file, name, text_field)
            else:
                yield from _read_jsonl(file, name, text_field)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise DataError(f"{name}: cannot be read ({error})") from None


def _read_text(file: BinaryIO, name: str) -> Document:
    content = file.read()
    return Document(_decode(content, name, 0).removeprefix("\ufeff"), len(content))


def _decode(content: bytes, where: str, offset: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: invalid UTF-8 at byte {offset + error.start} "
            f"(0x{content[error.start]:02x}); convert the text to UTF-8"
        ) from None


def _read_jsonl(file: BinaryIO, name: str, text_field: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(_decompressed(file, name), start=1):
        where = f"{name}:{number}"
        text = _decode(line, where, offset)
        offset += len(line)
        if text.strip():
            yield Document(_json_text(text, where, text_field), file.tell())


def _decompressed(file: BinaryIO, name: str) -> Any:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if name.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"), _READ_BYTES)
    return file


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


def _read_parquet(file: BinaryIO, name: str, text_field: str) -> Iterator[Document]:
    size = file.seek(0, io.SEEK_END)
    with pa.parquet.ParquetFile(file) as table:
        if text_field not in table.schema_arrow.names:
            raise DataError(f"{name}: {_missing_field(text_field, table.schema_arrow.names)}")
        rows = max(1, table.metadata.num_rows)
        for row, scalar in enumerate(_parquet_values(table, text_field), start=1):
            where = f"{name} row {row}"
            yield Document(_parquet_text(scalar, where, text_field), size * row // rows)


def _parquet_text(scalar: pa.Scalar, where: str, text_field: str) -> str:
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as error:  # Parquet's text is not checked when it is written
        raise DataError(
            f"{where}: invalid UTF-8 at byte {error.start}; convert the text to UTF-8"
        ) from None
    return _checked_text(value, where, text_field)


def _parquet_values(table: pa.parquet.ParquetFile, column: str) -> Iterator[pa.Scalar]:
    # Row group by row group: no more than one of them, of one column, is in memory.
    for group in range(table.num_row_groups):
        for batch in table.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[column]):
            yield from batch.column(0)
