"""One package into compressed files of documents, and what the manifest says of it."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from asa_jax.data.shard_writer import PARTIAL, file_sha256, whole_file
from asa_jax.errors import DataError
from experiments.corpus.archives import Member, read_members
from experiments.corpus.documents import LongDocument, join_pages, place
from experiments.corpus.packages import VALIDATION_FRACTIONS, Package
from experiments.corpus.readers import READERS

SUFFIX = ".jsonl.zst"
TEXT_VERSION = 1  # goes up whenever the same packages give other documents
# Slow to write (2 MB of text a second and core) and quick to read; 12 is a fifth larger.
COMPRESSION_LEVEL = 19
_COPYRIGHT = re.compile(r"/copyright$|package/package\.json$")
_LICENCE_LINE = re.compile(r"^License:[ \t]*(\S.*)$", re.MULTILINE)
_KNOWN_LICENCES = (
    "GFDL", "Free Documentation", "GPL", "Apache", "BSD", "MIT", "PostgreSQL", "public domain"
)  # fmt: skip


@dataclasses.dataclass
class _File:
    """A file of the corpus while it is written, uncompressed."""

    path: Path
    split: str
    stream: BinaryIO
    documents: int = 0
    text_bytes: int = 0


class _Licence:
    """Looks at the members that pass for what they say of the licence."""

    def __init__(self) -> None:
        self.found = "not stated in the package"

    def watch(self, members: Iterable[Member]) -> Iterator[Member]:
        for member in members:
            if not _COPYRIGHT.search(member.path):
                yield member
            elif member.path.endswith(".json"):
                self.found = str(json.loads(member.content).get("license", self.found))
            else:
                self.found = _licence(member.content.decode(errors="replace"))


def _licence(copyright_text: str) -> str:
    names = sorted(set(_LICENCE_LINE.findall(copyright_text)))
    if names:
        return "; ".join(names)
    known = [name for name in _KNOWN_LICENCES if name.lower() in copyright_text.lower()]
    return f"words of its copyright file: {', '.join(known) or 'none known'}"


def build_package(
    package: Package, archive: Path, output: Path, seed: int, report: Callable[[int], None]
) -> dict[str, Any]:
    """Writes the documents of a package to `output/<part>/`, compressed.

    Args:
        package: what it is.
        archive: its .deb or .tgz.
        output: the corpus folder.
        seed: of the split into training and validation.
        report: called with how many bytes of the archive are done, now and then.

    Returns:
        The record of the package in the manifest.

    Raises:
        DataError: the archive or a file in it is damaged.
        OSError: the disk is full.
    """
    reader = READERS[package.part]
    licence = _Licence()
    size = archive.stat().st_size

    def wanted(path: str, member_bytes: int) -> bool:
        return bool(_COPYRIGHT.search(path)) or reader.wanted(path, member_bytes)

    # Reading is one half of the work and compressing the other.
    members = read_members(archive, wanted, lambda position: report(position // 2))
    documents = join_pages(reader.pages(licence.watch(members)))
    with contextlib.ExitStack() as stack:
        try:
            files = _write_plain(package, documents, output, seed, stack)
        except ValueError as error:  # of JSON, or half a surrogate pair in it
            raise DataError(f"{archive}: holds a file that cannot be read ({error})") from None
        done = [size // 2]

        def compress(file: _File) -> dict[str, Any]:
            record = _compress(file)
            done.append(size // 2 // len(files))
            report(sum(done))
            return record

        # zstd runs outside of the interpreter's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            records = list(pool.map(compress, files))
    return {
        **request(package, archive, seed),
        "client": package.client,
        "licence": licence.found,
        "files": records,
    }


def request(package: Package, archive: Path, seed: int) -> dict[str, Any]:
    """What the files of a package follow from: equal requests give equal files."""
    return {
        "text_version": TEXT_VERSION,
        "name": package.name,
        "part": package.part,
        "archive": archive.name,
        "seed": seed,
        "validation_fraction": VALIDATION_FRACTIONS[package.part],
        "shards": package.shards,
    }


def _write_plain(
    package: Package,
    documents: Iterable[LongDocument],
    output: Path,
    seed: int,
    stack: contextlib.ExitStack,
) -> list[_File]:
    files: dict[int | None, _File] = {}
    for document in documents:
        fraction = VALIDATION_FRACTIONS[package.part]
        where = place(document.text, seed, fraction, package.shards)
        if where not in files:
            files[where] = _open(package, where, output, stack)
        record = {"text": document.text, "source": f"{package.name}/{document.group}"}
        files[where].stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        files[where].documents += 1
        files[where].text_bytes += document.text_bytes
    return sorted(files.values(), key=lambda file: file.path)


def _open(package: Package, where: int | None, output: Path, stack: contextlib.ExitStack) -> _File:
    split = "validation" if where is None else "train"
    stem = package.name.removeprefix("@").replace("/", "-")
    path = output / package.part / f"{stem}.{split}-{where or 0:05d}{SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.with_name(f"{path.name}.plain{PARTIAL}")
    stream = stack.enter_context(open(plain, "w+b"))  # noqa: SIM115 - closed by the stack
    stack.callback(plain.unlink)
    return _File(path, split, stream)


def _compress(file: _File) -> dict[str, Any]:
    file.stream.seek(0)
    # One frame: what is alike is found anywhere in the file.
    frame = pa.Codec("zstd", COMPRESSION_LEVEL).compress(file.stream.read(), asbytes=True)
    with whole_file(file.path) as compressed:
        compressed.write(frame)
    return {
        "name": f"{file.path.parent.name}/{file.path.name}",
        "split": file.split,
        "documents": file.documents,
        "text_bytes": file.text_bytes,
        "file_bytes": len(frame),
        "sha256": file_sha256(file.path),
    }
