"""Reads documents, one at a time, from text, JSONL and Parquet files, here or on the hub."""

import contextlib
import glob
import gzip
import io
import itertools
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
    """One document.

    Attributes:
        text: of it.
        bytes_read: how many bytes of its file are read with it.
        prompt: what stands before the text.
    """

    text: str
    bytes_read: int
    prompt: str = ""


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
        if Path(pattern).is_dir():
            raise DataError(f"{pattern}: is a folder; name its files, as '{Path(pattern)}/*.txt'")
        if not matches:
            raise DataError(f"{pattern}: no such file")
        found.update(matches)
    _check_suffixes(sorted(map(str, found)))
    return sorted(found)


def _check_suffixes(names: Sequence[str]) -> None:
    for name in names:
        if not name.endswith(SUFFIXES):
            raise DataError(f"{name}: unknown kind of file, expected {', '.join(SUFFIXES)}")


def read_documents(
    path: str | Path, text_field: str, prompt_field: str | None = None
) -> Iterator[Document]:
    """Reads one file: a .txt is one document, the others hold one a record.

    Args:
        path: file to read, or its hf:// name.
        text_field: name of the field or column with the text.
        prompt_field: name of that with the prompt; None: there are none.

    Raises:
        DataError: it cannot be read; names the file and the byte, line or row.
    """
    name = str(path)
    fields = [text_field] if prompt_field is None else [text_field, prompt_field]
    if prompt_field is not None and name.endswith(".txt"):
        raise DataError(f"{name}: a .txt has no field {prompt_field!r}; give prompts as .jsonl")
    on_hub = is_hub_name(name)
    try:
        with (
            hub_errors(name) if on_hub else contextlib.nullcontext(),
            open_hub_file(name) if on_hub else open(name, "rb") as file,
        ):
            if name.endswith(".txt"):
                yield _read_text(file, name)
            elif name.endswith(".parquet"):
                yield from _read_parquet(file, name, fields)
            else:
                yield from _read_jsonl(file, name, fields)
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


def _read_jsonl(file: BinaryIO, name: str, fields: Sequence[str]) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(_decompressed(file, name), start=1):
        where = f"{name}:{number}"
        content = _decode(line, where, offset)
        offset += len(line)
        if content.strip():
            text, *prompt = _json_texts(content, where, fields)
            yield Document(text, file.tell(), *prompt)


def _decompressed(file: BinaryIO, name: str) -> Any:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if name.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"), _READ_BYTES)
    return file


def _json_texts(line: str, where: str, fields: Sequence[str]) -> list[str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 ", "")  # of this one line
        raise DataError(f"{where}: broken JSON ({reason})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
    _check_fields(fields, list(record), where)
    return [_checked_text(record[field], where, field) for field in fields]


def _check_fields(fields: Sequence[str], present: Sequence[str], where: str) -> None:
    for field, flag in zip(fields, ("--text-field", "--prompt-field"), strict=False):
        if field not in present:
            names = ", ".join(present[:8]) or "nothing"
            raise DataError(f"{where}: no field {field!r} (it has {names}); name it with {flag}")


def _checked_text(value: object, where: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise DataError(
            f"{where}: field {field!r} holds half a surrogate pair at character {error.start}"
        ) from None
    return value


def _read_parquet(file: BinaryIO, name: str, fields: Sequence[str]) -> Iterator[Document]:
    size = file.seek(0, io.SEEK_END)
    with pa.parquet.ParquetFile(file) as table:
        _check_fields(fields, table.schema_arrow.names, name)
        rows = max(1, table.metadata.num_rows)
        for row, scalars in enumerate(_parquet_values(table, fields), start=1):
            where = f"{name} row {row}"
            text, *prompt = map(_parquet_text, scalars, itertools.repeat(where), fields)
            yield Document(text, size * row // rows, *prompt)


def _parquet_text(scalar: pa.Scalar, where: str, field: str) -> str:
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as error:  # Parquet's text is not checked when it is written
        raise DataError(
            f"{where}: invalid UTF-8 at byte {error.start}; convert the text to UTF-8"
        ) from None
    return _checked_text(value, where, field)


def _parquet_values(
    table: pa.parquet.ParquetFile, columns: Sequence[str]
) -> Iterator[tuple[pa.Scalar, ...]]:
    # Row group by row group: no more than one of them, of these columns, is in memory.
    for group in range(table.num_row_groups):
        for batch in table.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=columns):
            yield from zip(*map(batch.column, columns), strict=True)
