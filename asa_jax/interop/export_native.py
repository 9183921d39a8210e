"""The layout of models that no other program knows: ASA, NSA, MLA and mixtures of layers.

config.json holds `model_type` 'asa_jax' and, under `model`, every field of `ModelConfig`. A tensor
is a parameter, with its dimensions as they are: `embedding.table`, `final_norm.scale`, and for each
layer `model.layers.3.attention.down.weight`. docs/interop.md lists them.
"""

import dataclasses
import string
from pathlib import Path
from typing import Any

from asa_jax.config import ModelConfig, config_from_dict
from asa_jax.errors import ConfigError, ImportedModelError
from asa_jax.interop.hugging_face_config import CONFIG_FILE, HuggingFaceConfig
from asa_jax.interop.safetensors_files import read_json_object
from asa_jax.interop.tensor_table import Row, Table
from configs import base

MODEL_TYPE = "asa_jax"
FORMAT_VERSION = 1


def native_fields(model: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of a model in this layout, given the fields of its `ModelConfig`."""
    return {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, "model": model}


def read_native(folder: Path) -> ModelConfig:
    """Reads the config.json of a model in this layout.

    Raises:
        ImportedModelError: a field is missing, unknown or wrong, or the format not known.
    """
    HuggingFaceConfig.of_folder(folder).require("format_version", None, FORMAT_VERSION)
    path = folder / CONFIG_FILE
    values = base.get_config().to_dict() | {"model": read_json_object(path).get("model")}
    try:
        return config_from_dict(values).model
    except ConfigError as error:
        raise ImportedModelError(f"{path}: {error}") from None


def native_table(cfg: ModelConfig) -> Table:
    """The table of a model: each parameter is a tensor of the same shape."""
    # Only here, so that config.json is read and refused without jax.
    from flax import nnx

    from asa_jax.interop.convert import abstract_layer
    from asa_jax.model.transformer import abstract_model

    letters: dict[tuple[int, int], str] = {}

    def rows(tree: Any) -> tuple[Row, ...]:
        flat = nnx.traversals.flatten_mapping(tree)
        return tuple(_row(path, leaf.shape, letters) for path, leaf in flat.items())

    # Alike layers are traced once, so that config.json cannot make this take long.
    dense = dataclasses.replace(cfg.experts, num_experts=0)
    shapes = abstract_model(
        dataclasses.replace(cfg, layer_kinds=cfg.layer_kinds[:1], experts=dense)
    )[1]
    outside = rows({name: shapes[name] for name in ("embedding", "final_norm")})
    num_dense = cfg.experts.num_dense_layers if cfg.experts.num_experts else cfg.num_layers
    kinds = [(kind, i < num_dense) for i, kind in enumerate(cfg.layer_kinds)]
    layers = {
        kind: rows(abstract_layer(kinds.index(kind), cfg)[1]) for kind in dict.fromkeys(kinds)
    }
    sizes = {letter: size for (_, size), letter in letters.items()}
    return Table(sizes, outside, lambda layer: layers[kinds[layer]], ())


def _row(path: tuple[str, ...], shape: tuple[int, ...], letters: dict[tuple[int, int], str]) -> Row:
    """A row without any change; a letter stands for one size on one dimension."""
    unused = iter(set(string.ascii_letters) - set(letters.values()))
    names = [letters.setdefault(place, next(unused)) for place in enumerate(shape)]
    return Row("/".join(map(str, path)), ".".join(map(str, path)), " ".join(names), "".join(names))
