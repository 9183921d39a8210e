"""Writes shards so that a file with its final name is always whole."""

import array
import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from asa_jax.data.shards import Shard, check_file_size
from asa_jax.errors import DataError

PARTIAL = ".partial"
LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other processes from writing to it while the block runs.

    Raises:
        DataError: one is writing to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is writing to it") from None
        yield


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that gets its name when the block ends, on disk; nothing is left on an error."""
    partial = _partial(path)
    try:
        with open(partial, "wb") as file:
            yield file
            _publish(file, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _publish(file: BinaryIO, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    os.replace(_partial(path), path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes or replaces a JSON file whole."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


class ShardWriter:
    """Streams documents into one shard; only the offsets are held in memory."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, end_of_document_id: int) -> None:
        self.tokens = 0
        self._folder = folder
        self._name = name
        self._dtype = dtype
        self._end = np.array([end_of_document_id], dtype).tobytes()
        self._text_bytes = 0
        self._offsets = array.array("q", [0])
        self._text_starts = array.array("q")
        self._sha256 = hashlib.sha256()
        self._path = folder / f"{name}.bin"
        self._file = open(_partial(self._path), "wb")  # noqa: SIM115 - closed by commit or discard

    def append(self, prompt: np.ndarray, text: np.ndarray, text_bytes: int) -> None:
        """Adds one document, a prompt and a text of `text_bytes` together, and its end."""
        content = np.concatenate([prompt, text]).astype(self._dtype).tobytes() + self._end
        self._file.write(content)
        self._sha256.update(content)
        self._text_bytes += text_bytes
        self._text_starts.append(self.tokens + len(prompt))
        self.tokens += len(prompt) + len(text) + 1
        self._offsets.append(self.tokens)

    def commit(self) -> Shard:
        """Gives both files their names."""
        with self._file:
            _publish(self._file, self._path)
        path = self._folder / f"{self._name}.offsets.npy"
        offsets = np.frombuffer(self._offsets, np.int64)
        if self._text_starts != self._offsets[:-1]:
            offsets = np.stack([offsets, [*self._text_starts, self.tokens]])
        with whole_file(path) as file:
            np.save(file, offsets, allow_pickle=False)
        return Shard(
            name=self._name,
            tokens=self.tokens,
            documents=len(self._offsets) - 1,
            text_bytes=self._text_bytes,
            tokens_sha256=self._sha256.hexdigest(),
            offsets_sha256=file_sha256(path),
        )

    def discard(self) -> None:
        """Drops the unfinished shard."""
        with contextlib.suppress(OSError):  # a full disk fails once more at the last flush
            self._file.close()
        _partial(self._path).unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_shard(folder: Path, shard: Shard, dtype: np.dtype) -> None:
    """Reads a shard again and compares it with what was written.

    Raises:
        DataError: a file is missing or differs.
    """
    check_file_size(folder / shard.tokens_file, shard.tokens * dtype.itemsize)
    written = {shard.tokens_file: shard.tokens_sha256, shard.offsets_file: shard.offsets_sha256}
    for name, digest in written.items():
        if not (folder / name).exists() or file_sha256(folder / name) != digest:
            raise DataError(f"{folder / name}: changed since it was written; add --overwrite")
