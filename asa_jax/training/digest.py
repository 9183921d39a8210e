"""Digests of checkpoint folders: a flipped byte restores without an error otherwise."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DIGEST = "digest.json"
# Orbax touches these last; restoring does not depend on them.
_UNVERIFIED = (DIGEST, "_CHECKPOINT_METADATA", "commit_success.txt")


def write_digest(folder: Path) -> None:
    """Writes size and sha256 of every file of a folder to its digest.json."""
    files = {str(file.relative_to(folder)): file for file in _files(folder)}
    with ThreadPoolExecutor() as threads:
        entries = dict(zip(files, threads.map(_entry, files.values()), strict=True))
    (folder / DIGEST).write_text(json.dumps(entries, indent=1, sort_keys=True))


def verify_digest(folder: Path) -> str | None:
    """Compares a folder with its digest.json.

    Args:
        folder: a finished checkpoint.

    Returns:
        None if every file is as written, else what is wrong, in a few words.
    """
    try:
        expected = json.loads((folder / DIGEST).read_text())
    except FileNotFoundError:
        return f"{DIGEST} is missing"
    except (OSError, ValueError):
        return f"{DIGEST} cannot be read"
    if not isinstance(expected, dict) or not expected:
        return f"{DIGEST} lists no files"
    if any(file.is_symlink() for file in folder.rglob("*")):
        return "it holds a symbolic link"
    files = [folder / name for name in expected]
    if not all(file.resolve().is_relative_to(folder.resolve()) for file in files):
        return f"{DIGEST} names a file outside the folder"
    for file in files:
        if not file.is_file():
            return f"{file.relative_to(folder)} is missing"
    with ThreadPoolExecutor() as threads:
        for file, entry in zip(files, threads.map(_entry, files), strict=True):
            name = str(file.relative_to(folder))
            if entry != expected[name]:
                return f"{name} is not as it was written"
    return None


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in _UNVERIFIED:
            yield file


def _entry(file: Path) -> dict[str, int | str]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
