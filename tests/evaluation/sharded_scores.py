"""Scores sequences on several meshes of simulated devices; a child process of test_sharded_scores.

Reads {"config": ..., "meshes": [...]} from stdin, writes nats and hits of each mesh.
"""

import json
import sys

import jax
import numpy as np

from asa_jax.config import MeshConfig, config_from_dict
from asa_jax.data.tokenizer import ByteTokenizer
from asa_jax.evaluation.scorer import Scorer
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import make_mesh, param_shardings
from tests.models import random_params

SIZES = (2, 17, 40, 200, 5)


def main() -> None:
    request = json.load(sys.stdin)
    config = config_from_dict(request["config"])
    params = random_params(config.model)
    _, shapes, axes = abstract_model(config.model)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 256, size).astype(np.int32) for size in SIZES]
    results = []
    for sizes in request["meshes"]:
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        mesh = make_mesh(MeshConfig(**sizes), devices)
        placed = jax.device_put(params, param_shardings(mesh, axes, shapes))
        scores = Scorer(config, placed, ByteTokenizer(), mesh).score(sequences)
        results.append([np.concatenate(field).tolist() for field in zip(*scores, strict=True)])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
