"""Parameters that a run starts from: of another run or a model folder, converted where need be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from asa_jax.config import ModelConfig
from asa_jax.interop.convert import LayerConversion, convert_params
from asa_jax.interop.restore import restore_model
from asa_jax.training.step import Batch


def load_initial_params(
    path: Path, cfg: ModelConfig, mesh: Mesh, batch: Callable[[], Batch]
) -> tuple[Any, list[LayerConversion]]:
    """Loads parameters, the newest ones of a run, and converts them; under `jax.set_mesh(mesh)`.

    Args:
        path: a run directory or a model folder.
        cfg: the model that starts from them.
        mesh: the devices.
        batch: gives real text, on which layers are fitted.

    Returns:
        float32 parameters, sharded over the mesh, and a report of every layer whose kind changed.

    Raises:
        CheckpointError: the run has no usable checkpoint.
        ImportedModelError: the model folder is damaged, or its architecture not supported.
        ConfigError: there is no conversion to this model.
    """
    config, params, _ = restore_model(path, mesh)
    return convert_params(params, config.model, cfg, mesh, batch())
