"""Compiles the training step of configs/asa_340m.py for 8 simulated devices; no array is made.

Started by test_collectives.py with JSON: a list of meshes (data, fsdp, tensor, context) and the
fields that differ. Prints one JSON object: for each mesh the collectives of a step.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.collectives import collectives
from asa_jax.config import Config, config_from_dict
from asa_jax.sharding import MESH_AXES, make_mesh
from asa_jax.training.step import make_trainer
from configs import asa_340m


def config_340m(sizes: list[int], fields: dict[str, Any]) -> Config:
    """The real shapes, but for the dtype: XLA on a CPU has no bfloat16 to travel."""
    config = asa_340m.get_config()
    config.update_from_flattened_dict({"model.compute_dtype": "float32", **fields})
    config.mesh = dict(zip(MESH_AXES, sizes, strict=True))
    return config_from_dict(config.to_dict())


def main(meshes: list[list[int]], fields: dict[str, Any]) -> None:
    result = {}
    for sizes in meshes:
        config = config_340m(sizes, fields)
        mesh = make_mesh(config.mesh)
        shape = (config.data.batch_size, config.data.sequence_length)
        names = ("inputs", "targets", "positions", "segment_ids")
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
        with jax.set_mesh(mesh):
            trainer = make_trainer(config, mesh, np.ones(config.model.vocab_size, np.int32))
            compiled = trainer.step.lower(trainer.state, batch).compile()  # type: ignore[attr-defined]
        result[str(sizes)] = [
            each._asdict() for each in collectives(compiled.as_text(), mesh.shape)
        ]
    print(json.dumps(result))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
