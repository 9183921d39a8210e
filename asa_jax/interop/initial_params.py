"""Parameters that a run starts from: those of another run, converted where layers differ."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from asa_jax.config import ModelConfig
from asa_jax.interop.convert import LayerConversion, convert_params
from asa_jax.training.checkpoint import restore_params
from asa_jax.training.step import Batch


def load_initial_params(
    path: Path, cfg: ModelConfig, mesh: Mesh, batch: Callable[[], Batch]
) -> tuple[Any, list[LayerConversion]]:
    """Loads the newest parameters of a run and converts them; under `jax.set_mesh(mesh)`.

    Args:
        path: a run directory.
        cfg: the model that starts from them.
        mesh: the devices.
        batch: gives real text, on which layers are fitted.

    Returns:
        float32 parameters, sharded over the mesh, and a report of every layer whose kind changed.

    Raises:
        CheckpointError: the run has no usable checkpoint.
        ConfigError: there is no conversion to this model.
    """
    source, params, _ = restore_params(path, mesh)
    return convert_params(params, source.model, cfg, mesh, batch())
