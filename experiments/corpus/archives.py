"""The files inside packages, read in one pass without unpacking anything to disk.

A .deb is an `ar` archive: a magic line, then members padded to an even length, each behind a header
of 60 bytes with its name in the first 16 and its size in decimal from byte 48. One member,
`data.tar.*`, holds the files. An npm .tgz is a compressed tar.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from asa_jax.errors import DataError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60
_NESTED = ".tar.xz"


class Member(NamedTuple):
    """A file of a package: its path in it, and its content."""

    path: str
    content: bytes


def read_members(
    path: Path,
    wanted: Callable[[str, int], bool],
    report: Callable[[int], None] = lambda position: None,
) -> Iterator[Member]:
    """Reads the files of a package in the order they are stored; a .tar.xz in it is entered.

    Args:
        path: a .deb or .tgz.
        wanted: whether to read a file, from its path and its bytes.
        report: called with how many bytes of the archive are read.

    Raises:
        DataError: it is damaged.
    """
    try:
        with open(path, "rb") as file:
            if path.suffix == ".deb":
                _seek_data(file, path)
            # Unlike tarfile's own, this gzip says where an archive is cut off between two files.
            tar = gzip.GzipFile(fileobj=file) if path.suffix == ".tgz" else file
            for member in _read_tar(tar, wanted):
                report(file.tell())
                yield member
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it to fetch it again") from None


def _seek_data(file: BinaryIO, path: Path) -> None:
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise DataError(f"{path}: not a .deb; delete it to fetch it again")
    while len(header := file.read(_AR_HEADER_BYTES)) == _AR_HEADER_BYTES:
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            if file.tell() + size > os.fstat(file.fileno()).st_size:
                raise DataError(f"{path}: is cut off; delete it to fetch it again")
            return
        file.seek(size + size % 2, 1)
    raise DataError(f"{path}: holds no data.tar; delete it to fetch it again")


def _read_tar(file: Any, wanted: Callable[[str, int], bool]) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        for info in tar:
            name = info.name.removeprefix("./")
            enter = name.endswith(_NESTED)
            if not info.isfile() or not (enter or wanted(name, info.size)):
                continue
            content = tar.extractfile(info)
            assert content is not None  # a plain file has content
            if enter:
                yield from _read_tar(content, wanted)
            else:
                yield Member(name, content.read())
