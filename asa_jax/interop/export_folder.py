"""Writes a model folder: config.json, tokenizer.json and safetensors."""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from asa_jax.config import Config, ModelConfig, config_to_dict
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import UserError
from asa_jax.interop.chat import ChatTemplate
from asa_jax.interop.export_native import native_fields, native_table
from asa_jax.interop.export_options import GIGABYTE, check_output
from asa_jax.interop.export_tokenizer import write_tokenizer
from asa_jax.interop.export_transformers import transformers_layout, transformers_type
from asa_jax.interop.folder_tokenizer import GENERATION_CONFIG
from asa_jax.interop.hugging_face_config import CONFIG_FILE
from asa_jax.interop.safetensors_files import INDEX_FILE, SINGLE_FILE
from asa_jax.interop.tensor_table import Place, Table, all_places
from asa_jax.model.param_layout import layer_places


def export_model(
    config: Config,
    params: Any,
    tokenizer: Tokenizer,
    output: Path,
    *,
    template: ChatTemplate | None = None,
    dtype: str = "float32",
    max_file_bytes: int = 5 * GIGABYTE,
    overwrite: bool = False,
) -> None:
    """Writes a model folder, whole or not at all.

    Args:
        config: of the run.
        params: its parameters.
        tokenizer: its tokenizer.
        output: the folder.
        template: of its chats; None: it has none.
        dtype: of the tensors.
        max_file_bytes: of one safetensors file, unless a single tensor is larger.
        overwrite: replace a model that is there.

    Raises:
        ConfigError: there is a folder that may not be replaced.
        UserError: a file cannot be written.
    """
    output = Path(os.path.abspath(output))  # with a name, also where it is '.'
    check_output(output, overwrite=overwrite)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        fields, table = _layout(config)
        _write_config(partial, fields, config, tokenizer, dtype)
        write_tokenizer(partial, tokenizer, template, config.data.sequence_length)
        _write_tensors(partial, table, config.model, params, dtype, max_file_bytes)
        _replace(output, partial)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(output: Path, partial: Path) -> None:
    """Gives `partial` the name `output`; what was there is removed last."""
    if output.exists():
        old = partial.with_suffix(".old")
        output.rename(old)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)


def _layout(config: Config) -> tuple[dict[str, Any], Table]:
    if transformers_type(config.model):
        return transformers_layout(config)
    return native_fields(config_to_dict(config)["model"]), native_table(config.model)


def _write_config(
    folder: Path, fields: dict[str, Any], config: Config, tokenizer: Tokenizer, dtype: str
) -> None:
    ends = list(tokenizer.end_ids)
    end = ends if len(ends) > 1 else ends[0]
    fields |= {
        "vocab_size": config.model.vocab_size,
        "max_position_embeddings": config.data.sequence_length,
        "eos_token_id": end,
        "bos_token_id": None,
        "dtype": dtype,
    }
    _write_json(folder / CONFIG_FILE, fields)
    _write_json(folder / GENERATION_CONFIG, {"eos_token_id": end})


def _write_tensors(
    folder: Path, table: Table, cfg: ModelConfig, params: Any, dtype: str, max_file_bytes: int
) -> None:
    parts: dict[str, list[Place]] = defaultdict(list)
    for place in all_places(table, layer_places(cfg)):
        parts[place.tensor].append(place)
    flat = nnx.traversals.flatten_mapping(params)
    nbytes = {name: _num_bytes(places[0], table, dtype) for name, places in parts.items()}
    files = _distribute(nbytes, max_file_bytes)
    for file, names in files.items():
        tensors = {name: _tensor(parts[name], table, flat, dtype) for name in names}
        # transformers before version 5 asks for this word.
        save_file(tensors, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)  # the library leaves others no right to read
    if len(files) > 1:
        places = {name: file for file, names in files.items() for name in names}
        total = {"total_size": sum(nbytes.values())}
        _write_json(folder / INDEX_FILE, {"metadata": total, "weight_map": places})


def _distribute(nbytes: dict[str, int], max_file_bytes: int) -> dict[str, list[str]]:
    """Names of tensors by file, in their order; a file is full before the next one begins."""
    files: list[list[str]] = [[]]
    room = max_file_bytes
    for name, size in nbytes.items():
        if files[-1] and size > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(name)
        room -= size
    if len(files) == 1:
        return {SINGLE_FILE: files[0]}
    total = len(files)
    return {f"model-{i:05}-of-{total:05}.safetensors": names for i, names in enumerate(files, 1)}


def _num_bytes(place: Place, table: Table, dtype: str) -> int:
    return int(np.prod(place.row.tensor_shape(table.sizes))) * jnp.dtype(dtype).itemsize


def _tensor(
    places: Sequence[Place], table: Table, params: dict[Any, Any], dtype: str
) -> np.ndarray:
    tensor = np.empty(places[0].row.tensor_shape(table.sizes), jnp.dtype(dtype))
    for place in places:
        values = np.asarray(params[place.path][place.stacked])
        with np.errstate(over="ignore"):  # told below
            place.row.write(tensor, values.astype(tensor.dtype), table.sizes)
    if dtype == "float16" and not np.isfinite(tensor).all():
        raise UserError(f"{places[0].tensor}: has values beyond float16; export another --dtype")
    return tensor


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
