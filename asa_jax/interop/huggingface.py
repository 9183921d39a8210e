"""Loads models from folders of Hugging Face: config.json, safetensors and tokenizer.json.

Tensors go from the memory map of their file straight into sharded arrays; nothing is downloaded and
no code of the folder runs. Everything is checked before the first array exists.
"""

import fnmatch
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from asa_jax.config import ModelConfig
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import ImportedModelError
from asa_jax.interop.architectures import read_architecture
from asa_jax.interop.folder_tokenizer import load_folder_tokenizer
from asa_jax.interop.safetensors_files import (
    INDEX_FILE,
    SINGLE_FILE,
    WEIGHT_DTYPES,
    Tensor,
    open_folder,
)
from asa_jax.interop.tensor_table import Place, Table, all_places
from asa_jax.model.param_layout import layer_places
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import param_shardings


def load_model(
    folder: str | Path, mesh: Mesh | None = None, param_dtype: str | None = None
) -> tuple[ModelConfig, Any, Tokenizer]:
    """Loads a model.

    Args:
        folder: with config.json, model.safetensors or its index and shards, and tokenizer.json.
        mesh: devices to hold the parameters; None: one device.
        param_dtype: of the parameters; None: as they are stored.

    Returns:
        The architecture, the parameters as a nested dict, and the tokenizer.

    Raises:
        ImportedModelError: a file is missing or damaged, or the architecture not supported.
        ConfigError: the mesh does not divide the parameters.
    """
    folder = Path(folder).expanduser()
    cfg, table = read_architecture(folder)
    tokenizer = load_folder_tokenizer(folder)
    return cfg, load_params(folder, cfg, table, mesh, param_dtype), tokenizer


def load_params(
    folder: Path,
    cfg: ModelConfig,
    table: Table,
    mesh: Mesh | None = None,
    param_dtype: str | None = None,
) -> Any:
    """Loads the parameters of a model.

    Args:
        folder: with its safetensors.
        cfg: the architecture.
        table: from its parameters to the tensors.
        mesh: devices to hold the parameters; None: one device.
        param_dtype: of the parameters; None: as they are stored.

    Returns:
        The parameters as a nested dict.

    Raises:
        ImportedModelError: a file is missing or damaged, or holds other tensors than the table.
        ConfigError: the mesh does not divide the parameters.
    """
    tensors = open_folder(folder)
    places = all_places(table, layer_places(cfg))
    check_tensors(folder, tensors, places, table)
    return read_params(tensors, places, table, cfg, mesh, param_dtype)


def read_params(
    tensors: Mapping[str, Any],
    places: Sequence[Place],
    table: Table,
    cfg: ModelConfig,
    mesh: Mesh | None = None,
    param_dtype: str | None = None,
) -> Any:
    """Reads the parameters of a model from tensors that have been checked.

    Args:
        tensors: by name, each a `Tensor` or what else has its `dtype` and `view()`.
        places: of `all_places`.
        table: from the parameters to the tensors.
        cfg: the architecture.
        mesh: devices to hold the parameters; None: one device.
        param_dtype: of the parameters; None: as they are stored.

    Returns:
        The parameters as a nested dict.

    Raises:
        ConfigError: the mesh does not divide the parameters.
    """
    _, shapes, axes = abstract_model(cfg)
    flat = nnx.traversals.flatten_mapping(shapes)
    if mesh is None:
        shardings = dict.fromkeys(flat, SingleDeviceSharding(jax.devices()[0]))
    else:
        shardings = nnx.traversals.flatten_mapping(param_shardings(mesh, axes, shapes))
    sources = defaultdict(list)
    for place in places:
        sources[place.path].append(_Source(place, tensors[place.tensor], table))
    assert sources.keys() == flat.keys()
    return nnx.traversals.unflatten_mapping(
        {
            path: _read(shape.shape, shardings[path], sources[path], param_dtype)
            for path, shape in flat.items()
        }
    )


def check_tensors(
    folder: Path, tensors: dict[str, Tensor], places: Sequence[Place], table: Table
) -> None:
    """Raises ImportedModelError unless the tensors are those of a table, in shape and dtype."""
    for place in places:
        tensor, shape = tensors.get(place.tensor), place.row.tensor_shape(table.sizes)
        if tensor is None:
            file = INDEX_FILE if (folder / INDEX_FILE).exists() else SINGLE_FILE
            raise ImportedModelError(f"{folder / file}: tensor {place.tensor} is missing")
        if tensor.shape != shape:
            raise ImportedModelError(
                f"{tensor.path}: tensor {tensor.name}: shape {list(tensor.shape)} must be "
                f"{list(shape)}, by config.json"
            )
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ImportedModelError(
                f"{tensor.path}: tensor {tensor.name}: dtype {tensor.dtype} must be one of "
                f"{', '.join(WEIGHT_DTYPES)}"
            )
    for name, original in table.copies.items():
        if name in tensors:
            _check_copy(tensors[name], tensors[original])
    known = {place.tensor for place in places} | table.copies.keys()
    for name in sorted(tensors.keys() - known):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in table.ignored):
            raise ImportedModelError(
                f"{tensors[name].path}: tensor {name} is not part of the model of config.json"
            )


def _check_copy(copy: Tensor, original: Tensor) -> None:
    alike = (copy.dtype, copy.shape) == (original.dtype, original.shape)
    if not alike or not np.array_equal(_bytes(copy), _bytes(original)):
        raise ImportedModelError(
            f"{copy.path}: tensor {copy.name}: differs from {original.name}, to which "
            "tie_word_embeddings of config.json ties it"
        )


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.view().view(np.uint8)


class _Source:
    """A part of a parameter, and the tensor that holds it."""

    def __init__(self, place: Place, tensor: Any, table: Table) -> None:
        self.stacked, self._row = place.stacked, place.row
        self._tensor, self._sizes = tensor, table.sizes
        self.dtype = WEIGHT_DTYPES[tensor.dtype]

    def view(self) -> np.ndarray:
        return self._row.view(self._tensor.view(), self._sizes)


def _read(
    shape: tuple[int, ...], sharding: Any, sources: list[_Source], param_dtype: str | None
) -> jax.Array:
    """Makes an array of which each device reads its own part."""
    dtype = jnp.dtype(param_dtype or jnp.result_type(*(source.dtype for source in sources)))

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
        values = np.empty([len(part) for part in ranges], dtype)
        for source in sources:
            leading = len(source.stacked)
            if all(i in part for i, part in zip(source.stacked, ranges, strict=False)):
                place = (i - ranges[k].start for k, i in enumerate(source.stacked))
                values[tuple(place)] = source.view()[index[leading:]]
        return values

    return jax.make_array_from_callback(shape, sharding, read)
