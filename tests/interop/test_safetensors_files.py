import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from asa_jax.errors import ImportedModelError
from asa_jax.interop.safetensors_files import open_file, open_folder

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=ml_dtypes.bfloat16),
    "c": np.ones((2, 1, 2), np.float16),
    "empty": np.zeros((0, 3), np.float32),
}


def test_tensors_are_read_only_views_of_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    tensors = open_folder(tmp_path)
    assert tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        view = tensors[name].view()
        assert view.dtype == expected.dtype
        np.testing.assert_array_equal(view, expected)
    assert isinstance(tensors["a"].view(), np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tensors["a"].view()[0, 0] = 1


def test_sharded_folder(tmp_path):
    _write_sharded(tmp_path)
    tensors = open_folder(tmp_path)
    assert tensors["a"].path.name == "one.safetensors"
    np.testing.assert_array_equal(tensors["b"].view(), TENSORS["b"])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("../two.safetensors", "tensor b: '../two.safetensors' must name a safetensors file"),
        ("/etc/two.safetensors", "must name a safetensors file of the same folder"),
        ("..", "must name a safetensors file of the same folder"),
        (3, "tensor b: 3 must name"),
        ("three.safetensors", "three.safetensors: is missing; by model.safetensors.index.json it"),
        ("one.safetensors", "tensor b is in the index, but not in the file"),
    ],
)
def test_index_with_a_wrong_file(tmp_path, place, message):
    _write_sharded(tmp_path, b=place)
    _expect(message, open_folder, tmp_path)


def test_index_without_a_tensor_of_a_file(tmp_path):
    _write_sharded(tmp_path)
    save_file({"b": TENSORS["b"], "d": TENSORS["a"]}, tmp_path / "two.safetensors")
    _expect("two.safetensors: tensor d is not of it in model.safe", open_folder, tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}', '{"weight_map": {}}'])
def test_broken_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    _expect("model.safetensors.index.json: ", open_folder, tmp_path)


def _entry(begin: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("second", "size", "message"),
    [
        (_entry(8, 16), 15, "tensor b: "),
        (_entry(8, 16), 17, "not fully covered"),
        (_entry(4, 12), 12, "invalid offset for tensor `b`"),
        (_entry(8, 16, dtype="BF16"), 16, "tensor b: "),
        (_entry(8, 16, shape=(3,)), 16, "tensor b: "),
        (_entry(8, 16, shape=(-2,)), 16, "tensor b: "),
        (_entry(8, 16, shape=(2**40, 2**40)), 16, "tensor b: "),
        (_entry(8, 2**62), 16, "tensor b: "),
        (_entry(8, 16, dtype="F33"), 16, "F33"),
        ({}, 16, "invalid JSON in header"),
    ],
)
def test_header_that_lies(tmp_path, second, size, message):
    header = json.dumps({"a": _entry(0, 8), "b": second}).encode()
    path = _write(tmp_path, struct.pack("<Q", len(header)) + header + bytes(size))
    _expect(message, open_file, path)


@pytest.mark.parametrize("length", [3, 20, 10**12, 2**63])
def test_header_of_another_length(tmp_path, length):
    header = json.dumps({"a": _entry(0, 8)}).encode()
    path = _write(tmp_path, struct.pack("<Q", length) + header + bytes(8))
    _expect("header", open_file, path)


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 4) + b"[1] "])
def test_file_that_is_none(tmp_path, content):
    _expect("header", open_file, _write(tmp_path, content))


def test_dtype_that_no_weight_has(tmp_path):
    save_file({"a": np.arange(3)}, tmp_path / "model.safetensors")
    tensors = open_folder(tmp_path)
    _expect("tensor a: dtype I64 cannot be read", tensors["a"].view)


def _write(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def _write_sharded(folder: Path, **places: object) -> None:
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "two.safetensors")
    places = {"a": "one.safetensors", "b": "two.safetensors", **places}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _expect(message, function, *args):
    with pytest.raises(ImportedModelError) as error:
        function(*args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
