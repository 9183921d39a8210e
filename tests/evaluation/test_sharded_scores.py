"""Scores on simulated devices, which divide rows and vocabulary, against one device."""

from pathlib import Path

import numpy as np

from asa_jax.config import config_to_dict
from tests.simulated_devices import run_on_eight_devices


def test_a_mesh_gives_the_scores_of_one_device(make_config):
    meshes = [
        dict(zip(("data", "fsdp", "tensor", "context"), sizes, strict=True))
        for sizes in ((1, 1, 1, 1), (1, 2, 2, 2))
    ]
    single, sharded = run_on_eight_devices(
        Path(__file__).with_name("sharded_scores.py"),
        {"config": config_to_dict(make_config()), "meshes": meshes},
    )
    np.testing.assert_allclose(sharded[0], single[0], rtol=1e-4)
    assert sharded[1] == single[1]
    assert any(single[1])
