"""What eval.py, generate.py and `init_from` take: a run directory or a model folder."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from asa_jax.config import Config
from asa_jax.errors import ConfigError
from asa_jax.interop.huggingface import load_model
from asa_jax.trained_run import is_model_folder, read_run_config
from asa_jax.training.checkpoint import restore_params


def restore_model(
    path: Path, mesh: Mesh | None = None, step: int | None = None
) -> tuple[Config, Any, int]:
    """Restores the parameters of a run, or loads those of a model folder.

    Args:
        path: a run directory or a model folder.
        mesh: devices to restore to; None: the first device.
        step: of a run, the step to restore; None: the newest usable one.

    Returns:
        The configuration, which for a folder is that of `configs/base.py` but for the model; the
        parameters, and the step they are of, 0 for a folder.

    Raises:
        CheckpointError: the run has no such step, or none is usable.
        ImportedModelError: the folder is damaged, or its architecture not supported.
        ConfigError: a step is asked of a folder.
    """
    if not is_model_folder(path):
        return restore_params(path, mesh, step)
    if step is not None:
        raise ConfigError(f"--step={step}: {path} is a model folder, which has no steps")
    return read_run_config(path), load_model(path, mesh)[1], 0
