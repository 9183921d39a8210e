"""Opening token folders: every kind of damage has a named error."""

import json
from pathlib import Path

import numpy as np
import pytest

from asa_jax.data.shards import TokenFolder, open_token_folder
from asa_jax.data.tokenizer import check_vocabulary
from asa_jax.errors import ConfigError, DataError

TEXTS = ["one document", "and another", "the last"]


@pytest.fixture
def folder(tmp_path: Path, write_folder) -> TokenFolder:
    return write_folder(tmp_path, TEXTS, ["held out"])


def edit_manifest(folder: TokenFolder, **changes: object) -> None:
    path = folder.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_it_says_what_it_holds(folder: TokenFolder) -> None:
    assert folder.vocab_size == 257 and folder.dtype == np.dtype("<u2")
    assert folder.total("train", "documents") == 3
    assert folder.total("train", "tokens") == sum(len(text) + 1 for text in TEXTS)
    assert folder.total("validation", "text_bytes") == len("held out")
    assert folder.tokenizer().fingerprint == folder.tokenizer_fingerprint == "bytes"


def test_tokens_are_the_bytes_and_the_ends(folder: TokenFolder) -> None:
    (shard,) = folder.split("train")
    np.testing.assert_array_equal(shard.read(4, 10), [*b"document", 256, ord("a")])
    np.testing.assert_array_equal(shard.offsets, [0, 13, 25, 34])


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_truncated_shard_tells_both_sizes(folder: TokenFolder, cut: int) -> None:
    path = folder.path / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=rf"train-00000\.bin: expected 68 bytes, found {68 - cut}"):
        open_token_folder(folder.path)


def test_a_shard_truncated_in_use_is_an_error_and_no_crash(folder: TokenFolder) -> None:
    (shard,) = folder.split("train")
    shard.read(0, 20)
    with open(shard.path, "r+b") as file:
        file.truncate(10)
    with pytest.raises(DataError, match="expected 68 bytes, found 10"):
        shard.read(0, 20)
    shard.path.unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin: cannot be read"):
        shard.read(0, 20)


def test_an_id_beyond_the_vocabulary_tells_its_byte(folder: TokenFolder) -> None:
    path = folder.path / "train-00000.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[[7, 9]] = [300, 65535]
    tokens.tofile(path)
    (shard,) = folder.split("train")
    np.testing.assert_array_equal(shard.read(0, 7), tokens[:7])
    with pytest.raises(
        DataError, match=r"train-00000\.bin: token id 300 at byte 14 is not below .* 257"
    ):
        shard.read(3, 10)


@pytest.mark.parametrize(
    "offsets",
    [[0, 13, 25], [1, 13, 25, 34], [0, 13, 25, 35], [0, 25, 13, 34], [0, 13, 13, 34]],
)
def test_wrong_offsets_are_refused(folder: TokenFolder, offsets: list[int]) -> None:
    np.save(folder.path / "train-00000.offsets.npy", np.array(offsets, np.int64))
    with pytest.raises(DataError, match=r"offsets\.npy: not the starts of 3 documents"):
        folder.split("train")


@pytest.mark.parametrize("starts", [[0, 13, 33, 34], [0, 12, 25, 34], [3, 13, 24, 34]])
def test_wrong_starts_of_texts_are_refused(folder: TokenFolder, starts: list[int]) -> None:
    rows = np.array([[0, 13, 25, 34], starts], np.int64)
    np.save(folder.path / "train-00000.offsets.npy", rows)
    with pytest.raises(DataError, match=r"offsets\.npy: not the starts of 3 documents"):
        folder.split("train")


def test_offsets_are_never_unpickled(folder: TokenFolder) -> None:
    np.save(folder.path / "train-00000.offsets.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(DataError, match=r"offsets\.npy: cannot be read"):
        folder.split("train")


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.offsets.npy"])
def test_a_missing_file_is_named(folder: TokenFolder, name: str) -> None:
    (folder.path / name).unlink()
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        open_token_folder(folder.path).split("train")


def test_an_unfinished_or_empty_folder_says_how_to_make_it(tmp_path: Path, write_folder) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json; make it with python -m asa_jax"):
        open_token_folder(tmp_path)
    folder = write_folder(tmp_path, TEXTS)
    with pytest.raises(DataError, match="no validation documents; prepare it with --validation-in"):
        folder.split("validation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, expected 1"),
        ({"vocab_size": None}, "TypeError"),
        ({"shards": [{"name": "train-00000"}]}, "not a list of shards"),
        ({"shards": 5}, "TypeError"),
    ],
)
def test_a_wrong_manifest_is_named(
    folder: TokenFolder, changes: dict[str, object], message: str
) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(DataError, match=message) as caught:
        open_token_folder(folder.path)
    assert "manifest.json" in str(caught.value)


def test_a_manifest_cannot_point_out_of_the_folder(folder: TokenFolder) -> None:
    shards = json.loads((folder.path / "manifest.json").read_text())["shards"]
    edit_manifest(folder, shards=[shards[0] | {"name": "../train-00000"}])
    with pytest.raises(DataError, match="not a list of shards"):
        open_token_folder(folder.path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_broken_manifest_is_named(folder: TokenFolder, content: str) -> None:
    (folder.path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: .* again"):
        open_token_folder(folder.path)


def test_a_swapped_tokenizer_is_refused(tmp_path: Path, write_folder) -> None:
    bundled = Path(__file__).parents[2] / "texts" / "tokenizer.json"
    folder = write_folder(tmp_path, TEXTS, (), "--tokenizer", str(bundled))
    assert folder.tokenizer().vocab_size == 4096
    content = (folder.path / "tokenizer.json").read_text()
    (folder.path / "tokenizer.json").write_text(content + "\n")
    with pytest.raises(DataError, match=r"tokenizer\.json: not the tokenizer that made the shards"):
        folder.tokenizer()


def test_the_model_must_have_a_row_for_every_token(folder: TokenFolder) -> None:
    check_vocabulary(folder.vocab_size, 257, "text")
    with pytest.raises(ConfigError, match=r"config\.model\.vocab_size = 256: must be at least 257"):
        check_vocabulary(folder.vocab_size, 256, "text")
