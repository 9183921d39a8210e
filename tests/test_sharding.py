"""The mesh, the shardings of parameters, and that a sharded model computes what one device does."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from absl.testing import parameterized
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from asa_jax.config import MeshConfig
from asa_jax.errors import ConfigError
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import MESH_AXES, batch_sharding, constrain, make_mesh, param_shardings
from tests.models import tiny_model_config

PROJECT = Path(__file__).resolve().parent.parent
# Layer kinds, and the mesh (data, fsdp, tensor, context) of 8 devices.
CASES = {
    "asa_data": (("local", "global"), (8, 1, 1, 1)),
    "asa_data_fsdp": (("local", "global"), (2, 4, 1, 1)),
    "asa_data_fsdp_tensor": (("local", "global"), (2, 2, 2, 1)),
    "asa_fsdp_tensor_context": (("local", "global"), (1, 2, 2, 2)),
    "nsa_fsdp_tensor_context": (("nsa",), (1, 2, 2, 2)),
    "full_fsdp": (("full",), (1, -1, 1, 1)),
}


@functools.cache
def _simulated() -> subprocess.CompletedProcess[str]:
    """All cases in one process, which has 8 devices where this one has 1."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-m", "tests.model.simulated_mesh", json.dumps(CASES)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=PROJECT, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def _result(name: str) -> dict[str, float]:
    return json.loads(_simulated().stdout.splitlines()[-1])[name]


class SimulatedDevicesTest(parameterized.TestCase):
    @parameterized.parameters(*CASES)
    def test_loss_and_gradients_equal_those_of_one_device(self, name):
        result = _result(name)
        self.assertLess(result["loss"], 1e-5)
        self.assertLess(result["gradients"], 1e-5)

    @parameterized.parameters(
        ("asa_data", 1), ("asa_data_fsdp", 1 / 4), ("asa_data_fsdp_tensor", 1 / 4),
        ("nsa_fsdp_tensor_context", 1 / 4), ("full_fsdp", 1 / 8),
    )  # fmt: skip
    def test_a_device_holds_its_part_of_the_parameters(self, name, part):
        """And a little more: norms, and latents that are whole on each tensor shard."""
        self.assertBetween(_result(name)["held"], part, 1.25 * part)

    def test_no_activation_is_copied_to_every_device(self):
        """The compiler warns where it finds no other way from one sharding to the next."""
        self.assertNotIn("full rematerialization", _simulated().stderr)


class MeshTest(parameterized.TestCase):
    def test_rest_of_the_devices(self):
        mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1, context=1))
        self.assertEqual(dict(mesh.shape), {"data": 1, "fsdp": 1, "tensor": 1, "context": 1})

    @parameterized.parameters(
        ((2, 1, 1, 1), 1, "data=2 x fsdp=1 x tensor=1 x context=1 needs 2 devices, but 1 are here"),
        ((1, 2, 2, 1), 8, "data=1 x fsdp=2 x tensor=2 x context=1 needs 4 devices, but 8 are here"),
        ((-1, 3, 1, 1), 8, "context=1 needs a multiple of 3 devices, but 8 are here"),
        ((-1, 4, 4, 1), 8, "context=1 needs a multiple of 16 devices, but 8 are here"),
    )
    def test_product_that_is_not_the_number_of_devices(self, sizes, num_devices, text):
        config = MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True)))
        with self.assertRaises(ConfigError) as caught:
            make_mesh(config, jax.devices()[:1] * num_devices)
        message = str(caught.exception)
        self.assertStartsWith(message, "config.mesh: data=")
        self.assertIn(text, message)
        self.assertNotIn("\n", message)

    def test_batches_are_split_by_row_and_by_position(self):
        mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1, context=1))
        self.assertEqual(batch_sharding(mesh).spec, P(("data", "fsdp"), "context"))

    def test_constrain_without_a_mesh_is_the_identity(self):
        x = jnp.ones((2, 3))
        self.assertIs(constrain(x, "batch", "sequence"), x)


class ParameterShardingTest(parameterized.TestCase):
    @parameterized.parameters("full", "mla", "global", "nsa")
    def test_every_parameter_follows_the_table(self, kind):
        _, shapes, axes = abstract_model(tiny_model_config((kind,), nsa_compression="mlp"))
        shardings = param_shardings(AbstractMesh((1, 2, 2, 2), MESH_AXES), axes, shapes)
        self.assertEqual(shardings["embedding"]["table"].spec, P("tensor", "fsdp"))
        layer = shardings["groups"][0]["layers"][0]
        self.assertEqual(layer["mlp"]["down"]["weight"].spec, P("tensor", "fsdp"))
        output = layer["attention"]["output"]["weight"]
        self.assertEqual(output.spec, P("tensor", None, "fsdp"))
        self.assertEqual(layer["mlp_norm"]["scale"].spec, P(None))

    @parameterized.parameters(
        ("full", 3, 1, "fsdp = 3", "'embed' of size 32", "['embedding']"),
        ("full", 1, 8, "tensor = 8", "heads' of size", "['attention']"),
        ("full", 1, 4, "tensor = 4", "'kv_heads' of size 2", "['key_value']['weight']"),
        ("global", 1, 8, "tensor = 8", "'heads' of size 4", "['attention']"),
    )
    def test_names_the_parameter_that_does_not_divide(self, kind, fsdp, tensor, *texts):
        _, shapes, axes = abstract_model(tiny_model_config((kind,)))
        with self.assertRaises(ConfigError) as caught:
            param_shardings(AbstractMesh((1, fsdp, tensor, 1), MESH_AXES), axes, shapes)
        message = str(caught.exception)
        self.assertStartsWith(message, "config.mesh.")
        for text in texts:
            self.assertIn(text, message)
        self.assertNotIn("\n", message)
