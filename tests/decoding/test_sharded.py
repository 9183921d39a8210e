"""Generation on simulated devices against one device."""

from pathlib import Path

import pytest

from asa_jax.config import config_to_dict
from tests.simulated_devices import run_on_eight_devices


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
    single, sharded = run_on_eight_devices(
        Path(__file__).with_name("sharded_generation.py"),
        {"config": config_to_dict(config), "meshes": meshes},
    )
    assert [len(row) for row in single] == [20] * 3
    assert len({token for row in single for token in row}) > 10
    assert sharded == single
