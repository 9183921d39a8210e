"""Compiles the training step of configs/asa_340m.py for 8 simulated devices; no array is made.

Started by test_collectives.py with JSON: a list of meshes (data, fsdp, tensor, context) and the
fields that differ. Prints one JSON object: for each mesh the collectives of a step.
"""

import json
import sys
from typing import Any

from asa_jax.collectives import collectives
from asa_jax.config import Config, config_from_dict
from asa_jax.sharding import MESH_AXES, make_mesh
from asa_jax.training.compile_time import lower_step
from configs import asa_340m


def config_340m(sizes: list[int], fields: dict[str, Any]) -> Config:
    """The real shapes, but for the dtype: XLA on a CPU has no bfloat16 to travel."""
    config = asa_340m.get_config()
    config.update_from_flattened_dict(
        {
            "model.compute_dtype": "float32",
            "model.remat": "full",
            "model.scan_layers": True,
            "optimizer.accumulation_steps": 1,
            **fields,
        }
    )
    config.mesh = dict(zip(MESH_AXES, sizes, strict=True))
    return config_from_dict(config.to_dict())


def main(meshes: list[list[int]], fields: dict[str, Any]) -> None:
    result = {}
    for sizes in meshes:
        config = config_340m(sizes, fields)
        mesh = make_mesh(config.mesh)
        compiled = lower_step(config, mesh).compile()
        result[str(sizes)] = [
            each._asdict() for each in collectives(compiled.as_text(), mesh.shape)
        ]
    print(json.dumps(result))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
