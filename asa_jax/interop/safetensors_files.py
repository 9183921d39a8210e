"""Tensors of a folder of safetensors files, read where they lie.

A file is 8 bytes of header length, a JSON header with dtype, shape and place of each tensor, and
the tensors. The `safetensors` package checks the header; the tensors are views of a memory map, so
that only the bytes that a device gets are read.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from asa_jax.errors import ImportedModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_DTYPES = MappingProxyType(
    {
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
    }
)
_MAX_JSON_BYTES = 2**28
# Bits of an element of the other dtypes, to name the tensor whose place does not fit its shape.
_BITS = {
    "F32": 32, "F16": 16, "BF16": 16, "F64": 64, "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16,
    "I32": 32, "U32": 32, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


class Tensor(NamedTuple):
    """A tensor of a file that has been opened.

    Attributes:
        path: of its file.
        name: in the file.
        dtype: as the format calls it: 'F32', 'BF16', ...
        shape: its dimensions.
        offset: of its first byte in the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def view(self) -> np.ndarray:
        """The tensor as a read-only view of the file.

        Raises:
            ImportedModelError: its dtype is none of WEIGHT_DTYPES.
        """
        if self.dtype not in WEIGHT_DTYPES:
            raise ImportedModelError(
                f"{self.path}: tensor {self.name}: dtype {self.dtype} cannot be read; "
                f"known are {', '.join(WEIGHT_DTYPES)}"
            )
        dtype = WEIGHT_DTYPES[self.dtype]
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, dtype)
        nbytes = math.prod(self.shape) * dtype.itemsize
        data = np.memmap(self.path, np.uint8, "r", offset=self.offset, shape=(nbytes,))
        return data.view(dtype).reshape(self.shape)


def open_folder(folder: Path) -> dict[str, Tensor]:
    """Opens `model.safetensors`, or the files that `model.safetensors.index.json` names.

    Args:
        folder: a model as Hugging Face stores it.

    Returns:
        The tensors by name; nothing but headers has been read.

    Raises:
        ImportedModelError: a file is missing, leaves the folder or is not what its header says, or
            the files hold other tensors than the index.
    """
    if not (folder / INDEX_FILE).exists():
        return open_file(folder / SINGLE_FILE)
    places = _read_index(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        named = {name for name, place in places.items() if place == file}
        if not (folder / file).exists():
            raise ImportedModelError(
                f"{folder / file}: is missing; by {INDEX_FILE} it holds tensor {min(named)}"
            )
        held = open_file(folder / file)
        for name in sorted(named ^ held.keys()):
            where = "is in the index, but not in the file" if name in named else "is not of it in"
            raise ImportedModelError(f"{folder / file}: tensor {name} {where} {INDEX_FILE}")
        tensors |= held
    return tensors


def open_file(path: Path) -> dict[str, Tensor]:
    """Opens one safetensors file.

    Args:
        path: of the file.

    Returns:
        The tensors by name; nothing but the header has been read.

    Raises:
        ImportedModelError: it cannot be read, is truncated, or its header is wrong.
    """
    try:
        with safe_open(path, framework="np"):
            pass
    except OSError as error:
        reason = error.strerror or str(error).split(":")[0]
        raise ImportedModelError(f"{path}: cannot be read ({reason})") from None
    except SafetensorError as error:
        raise ImportedModelError(f"{path}: {_wrong_tensor(path)}{error}") from None
    header, start = _read_header(path)
    return {
        name: Tensor(
            path, name, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a model folder.

    Args:
        path: of the file.

    Returns:
        The object.

    Raises:
        ImportedModelError: it cannot be read, or is no JSON object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ImportedModelError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > _MAX_JSON_BYTES:
        raise ImportedModelError(f"{path}: larger than {_MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ImportedModelError(f"{path}: broken JSON ({error})") from None
    if not isinstance(value, dict):
        raise ImportedModelError(f"{path}: must hold a JSON object")
    return value


def _read_index(folder: Path) -> dict[str, str]:
    """Names of files by tensor, each a plain name in the folder."""
    path = folder / INDEX_FILE
    places = read_json_object(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ImportedModelError(f"{path}: weight_map must give a file for each tensor")
    for name, file in places.items():
        plain = isinstance(file, str) and Path(file).name == file
        if not plain or not file.endswith(".safetensors"):
            raise ImportedModelError(
                f"{path}: tensor {name}: {file!r} must name a safetensors file of the same folder"
            )
    return places


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(min(length, _MAX_JSON_BYTES))), 8 + length


def _wrong_tensor(path: Path) -> str:
    """Names the first tensor whose place in the file cannot be; '' where the header is broken."""
    try:
        header, start = _read_header(path)
        size = path.stat().st_size - start
        for name, entry in header.items():
            if name != "__metadata__" and not _fits(entry, size):
                return f"tensor {name}: "
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return ""


def _fits(entry: Mapping[str, Any], size: int) -> bool:
    begin, end = entry["data_offsets"]
    bits = _BITS.get(entry["dtype"])
    nbytes = None if bits is None else math.prod(entry["shape"]) * bits // 8
    return 0 <= begin <= end <= size and nbytes in (None, end - begin)
