"""Generation on simulated devices against one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asa_jax.config import config_to_dict
from asa_jax.flags import PROJECT


@pytest.mark.parametrize(
    "kinds",
    [
        ("local", "global"),
        pytest.param(("mla", "nsa"), marks=pytest.mark.slow),
        pytest.param(("full", "sliding"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_mesh_draws_the_same_tokens(make_config, kinds):
    meshes = [
        dict(zip(("data", "fsdp", "tensor", "context"), sizes, strict=True))
        for sizes in ((1, 1, 1, 1), (1, 2, 2, 2))
    ]
    # Fewer latents than tensor shards, which then share the lists of blocks.
    config = make_config(kinds, num_latent_groups=1)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("sharded_generation.py")],
        input=json.dumps({"config": config_to_dict(config), "meshes": meshes}),
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
            "--xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(PROJECT),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    single, sharded = json.loads(done.stdout)
    assert [len(row) for row in single] == [20] * 3
    assert len({token for row in single for token in row}) > 10
    assert sharded == single
