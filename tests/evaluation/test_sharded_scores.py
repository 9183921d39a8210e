"""Scores on simulated devices, which divide rows and vocabulary, against one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from asa_jax.config import config_to_dict
from asa_jax.flags import PROJECT


def test_a_mesh_gives_the_scores_of_one_device(make_config):
    meshes = [
        dict(zip(("data", "fsdp", "tensor", "context"), sizes, strict=True))
        for sizes in ((1, 1, 1, 1), (1, 2, 2, 2))
    ]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("sharded_scores.py")],
        input=json.dumps({"config": config_to_dict(make_config()), "meshes": meshes}),
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
    np.testing.assert_allclose(sharded[0], single[0], rtol=1e-4)
    assert sharded[1] == single[1]
    assert any(single[1])
