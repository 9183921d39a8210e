"""The manifest of a corpus folder."""

from pathlib import Path
from typing import Any

from asa_jax.data.shard_writer import write_json
from asa_jax.data.shards import read_json
from experiments.corpus.packages import PARTS

MANIFEST = "manifest.json"


class Corpus:
    """The manifest of a corpus folder: which packages are finished, and their files."""

    def __init__(self, output: Path) -> None:
        self._output = output
        path = output / MANIFEST
        self.packages: dict[str, Any] = read_json(path)["packages"] if path.exists() else {}

    def holds(self, wanted: dict[str, Any]) -> bool:
        """Whether the files of a request are there."""
        record = self.packages.get(wanted["name"], {})
        same = all(record.get(name) == value for name, value in wanted.items())
        return same and all(self._is_whole(file) for file in record["files"])

    def _is_whole(self, file: dict[str, Any]) -> bool:
        path = self._output / file["name"]
        return path.exists() and path.stat().st_size == file["file_bytes"]

    def add(self, record: dict[str, Any]) -> None:
        """Lists a finished package, on disk too, and removes files that it no longer has."""
        before = self.packages.get(record["name"], {"files": []})
        names = {file["name"] for file in record["files"]}
        self.packages[record["name"]] = record
        write_json(self._output / MANIFEST, {"packages": self.packages})
        for file in before["files"]:
            if file["name"] not in names:
                (self._output / file["name"]).unlink(missing_ok=True)

    def describe(self) -> str:
        """A line for each part that is there."""
        lines = []
        for part in PARTS:
            records = [record for record in self.packages.values() if record["part"] == part]
            if not records:
                continue
            files = [file for record in records for file in record["files"]]
            text, compressed = (
                sum(file[field] for file in files) / 1e6 for field in ("text_bytes", "file_bytes")
            )
            documents = {
                split: sum(file["documents"] for file in files if file["split"] == split)
                for split in ("train", "validation")
            }
            lines.append(
                f"{part}: {documents['train']:,} train and {documents['validation']:,} validation "
                f"documents of {len(records)} packages, {text:,.1f} MB of text in "
                f"{compressed:,.1f} MB"
            )
        return "\n".join(lines)
