"""Eight simulated devices give what one gives, and checkpoints move between meshes."""

import types
from pathlib import Path

import numpy as np
import pytest

from asa_jax.config import MeshConfig, config_to_dict
from asa_jax.errors import ConfigError
from asa_jax.sharding import make_mesh
from asa_jax.training.step import make_trainer
from tests.simulated_devices import run_on_eight_devices

# The first, which saves the checkpoint, spreads parameters over every axis; the last has half of
# the devices.
MESHES = [
    {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
    {"data": 1, "fsdp": 1, "tensor": 1, "context": 1},
    {"data": 8, "fsdp": 1, "tensor": 1, "context": 1},
    {"data": 2, "fsdp": 2, "tensor": 1, "context": 1},
]
CONTEXT_MESHES = [
    *MESHES[:2],
    {"data": 1, "fsdp": 1, "tensor": 1, "context": 2},
    {"data": 1, "fsdp": 2, "tensor": 1, "context": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "optimizer", "meshes"),
    [(("sliding", "sliding"), "muon", MESHES), (("local", "global"), "adamw", CONTEXT_MESHES)],
)
def test_every_mesh_gives_the_losses_of_one_device(
    make_config, token_folder, tmp_path, kinds, optimizer, meshes
):  # fmt: skip
    config = make_config(
        **{
            "model.layer_kinds": kinds,
            "optimizer.name": optimizer,
            "optimizer.learning_rate": 1e-3,
            "data.batch_size": 16,
            "data.sources": (str(token_folder),),
            "optimizer.accumulation_steps": 2,
        }
    )
    request = {
        "config": config_to_dict(config), "meshes": meshes, "workdir": str(tmp_path)
    }  # fmt: skip
    result = run_on_eight_devices(Path(__file__).with_name("sharded_run.py"), request)
    for sizes, losses in zip(meshes, result["losses"], strict=True):
        np.testing.assert_allclose(losses, result["losses"][1], rtol=1e-4, err_msg=str(sizes))
    assert result["losses"][1][0] != result["losses"][1][2]
    assert result["same_start"]
    assert result["same_batch"]
    assert result["restored_exactly"] == [True] * len(meshes)


def test_a_batch_that_does_not_divide_is_refused_before_compiling(make_config, byte_lengths):
    mesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 1, "context": 4})
    with pytest.raises(ConfigError, match=r"config.data.batch_size = 6: .* = 4"):
        make_trainer(make_config(**{"data.batch_size": 6}), mesh, byte_lengths)
    with pytest.raises(ConfigError, match=r"config.data.sequence_length = 48: .* = 64"):
        make_trainer(make_config(**{"data.sequence_length": 48}), mesh, byte_lengths)


def test_a_mesh_of_another_size_than_the_machine_is_refused():
    with pytest.raises(ConfigError, match=r"config\.mesh: data=3 x fsdp=5"):
        make_mesh(MeshConfig(data=3, fsdp=5, tensor=1, context=1))
