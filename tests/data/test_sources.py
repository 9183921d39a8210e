"""Compressed JSONL, Parquet row group by row group, and files of the hub."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from asa_jax.data import hub
from asa_jax.data.prepare import parse, prepare
from asa_jax.data.shards import open_token_folder
from asa_jax.data.sources import find_inputs, read_documents
from asa_jax.errors import ConfigError, DataError

TEXTS = [f"document {i} é " * (1 + i) for i in range(50)]


def zst(path: Path, texts: list[str]) -> Path:
    frames = [
        "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        for part in (texts[:20], texts[20:])
    ]
    # Two frames one after the other, as tools that compress in parallel write them.
    path.write_bytes(b"".join(pa.Codec("zstd").compress(f, asbytes=True) for f in frames))
    return path


def test_zstd_lines_come_back(tmp_path: Path) -> None:
    path = zst(tmp_path / "a.jsonl.zst", TEXTS)
    found = list(read_documents(path, "text"))
    assert [document.text for document in found] == TEXTS
    assert found[-1].bytes_read == path.stat().st_size


def test_a_cut_zstd_file_is_named(tmp_path: Path) -> None:
    path = zst(tmp_path / "a.jsonl.zst", TEXTS)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: cannot be read"):
        list(read_documents(path, "text"))


def test_parquet_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    text = pa.array([b"good", b"caf\xe9"], pa.binary()).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row 2: invalid UTF-8 at byte 3"):
        list(read_documents(tmp_path / "a.parquet", "text"))


def test_parquet_is_held_a_row_group_at_a_time(tmp_path: Path) -> None:
    """The layout of FineWeb-Edu: other columns beside the text, a thousand rows a group."""
    letters = [f"{i:06d} " * 5000 for i in range(320)]
    table = pa.table({"text": letters, "id": range(320), "dump": ["x" * 35_000] * 320})
    path = tmp_path / "000_00000.parquet"
    pa.parquet.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False)
    size = table.column("text").nbytes
    del table
    before, peak, count = pa.total_allocated_bytes(), 0, 0
    for expected, document in zip(letters, read_documents(path, "text"), strict=True):
        peak = max(peak, pa.total_allocated_bytes() - before)
        count += document.text == expected
    assert count == 320
    assert 0 < peak < size / 8


class FakeHub(DirFileSystem):
    """A folder that answers as the hub's file system does."""

    def glob(self, path: str, **options: Any) -> dict[str, Any]:
        found = super().glob(path, **options)
        return {name: info | {"blob_id": f"oid-{info['size']}"} for name, info in found.items()}


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    data = folder / "datasets" / "org" / "name" / "sample"
    data.mkdir(parents=True)
    pa.parquet.write_table(pa.table({"text": TEXTS[:30], "id": range(30)}), data / "0.parquet")
    zst(data / "1.jsonl.zst", TEXTS[30:])
    monkeypatch.setattr(hub, "_file_system", lambda: FakeHub(str(folder), LocalFileSystem()))
    return data


def test_a_data_set_of_the_hub_is_prepared_like_files(tmp_path: Path, fake_hub: Path) -> None:
    common = ["--tokenizer", "bytes", "--output"]
    remote = ["--input", "hf://datasets/org/name/sample/*", *common, str(tmp_path / "remote")]
    prepare(parse(remote))
    prepare(parse(["--input", f"{fake_hub}/*", *common, str(tmp_path / "local")]))
    one, two = (open_token_folder(tmp_path / name) for name in ("remote", "local"))
    assert one.shards == two.shards
    assert one.total("train", "documents") + one.total("validation", "documents") == len(TEXTS)
    assert "nothing to do" in prepare(parse(remote))
    zst(fake_hub / "1.jsonl.zst", TEXTS)
    with pytest.raises(DataError, match=r"\(files changed\)"):
        prepare(parse(remote))


def test_the_hub_gives_its_own_name_of_the_content(fake_hub: Path) -> None:
    (file,) = find_inputs(["hf://datasets/org/name/sample/*.parquet"])
    size = (fake_hub / "0.parquet").stat().st_size
    assert file == ("hf://datasets/org/name/sample/0.parquet", size, f"oid-{size}")


def test_what_is_not_on_the_hub_is_one_line(fake_hub: Path) -> None:
    (fake_hub / "README.md").write_text("read me")
    with pytest.raises(DataError, match=r"hf://datasets/org/name/\*\.parquet: no such file"):
        find_inputs(["hf://datasets/org/name/*.parquet"])
    with pytest.raises(DataError, match=r"README\.md: unknown kind of file"):
        find_inputs(["hf://datasets/org/name/sample/*"])


def test_without_a_network_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        def glob(self, path: str, **options: Any) -> None:
            raise RuntimeError("no route\nto host")

        def open(self, path: str, mode: str) -> None:
            raise RuntimeError("no route\nto host")

    monkeypatch.setattr(hub, "_file_system", Away)
    with pytest.raises(DataError, match=r"hf://a/\*: cannot be read from the hub \(no route to"):
        find_inputs(["hf://a/*"])
    with pytest.raises(DataError, match=r"hf://a/b\.txt: cannot be read from the hub \(no route"):
        list(read_documents("hf://a/b.txt", "text"))


def test_without_its_package_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"huggingface_hub: pip install 'asa-jax\[hub\]'"):
        find_inputs(["hf://datasets/org/name/*.parquet"])
