"""Models over bytes, and a run of one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from asa_jax.config import Config, config_from_dict
from asa_jax.sharding import make_mesh
from asa_jax.training.checkpoint import make_meta
from asa_jax.training.checkpoint_writer import CheckpointWriter
from asa_jax.training.run_directory import open_run
from asa_jax.training.step import TrainState
from configs import base
from tests.models import random_params, tiny_model_config

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """make_config(kinds, **overrides) for a model with more tokens than there are bytes."""

    def make(kinds: tuple[str, ...] = ("local", "global"), **overrides: Any) -> Config:
        values = base.get_config().to_dict()
        model = tiny_model_config(kinds, **{"vocab_size": 300, **overrides})
        values["model"] = dataclasses.asdict(model)
        return config_from_dict(values)

    return make


@pytest.fixture(scope="session")
def workdir(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 1 and 2."""
    path, config = tmp_path_factory.mktemp("run"), make_config(("sliding",))
    with open_run(path, config, allow_changes=False), CheckpointWriter(path, keep=2) as writer:
        for step in (1, 2):
            params = jax.tree.map(jnp.asarray, random_params(config.model, seed=step))
            counters = jnp.int32(step), jnp.int32(0), jnp.int32(0), jnp.float32(0)
            state = TrainState(params, {"none": jnp.zeros(1)}, *counters)
            writer.save(state, {}, make_meta(config, make_mesh(config.mesh), state, {}))
    return path
