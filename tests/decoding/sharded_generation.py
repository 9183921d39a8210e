"""Generates on several meshes of simulated devices; a child process of test_sharded.py.

Reads {"config": ..., "meshes": [...]} from stdin, writes the tokens of each mesh.
"""

import json
import sys

import jax
import numpy as np

from asa_jax.config import MeshConfig, config_from_dict
from asa_jax.data.tokenizer import ByteTokenizer
from asa_jax.decoding.generate import Generator
from asa_jax.decoding.settings import Sampling
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import make_mesh, param_shardings
from tests.models import random_params

PROMPTS = [[*b"It is a truth universally acknowledged"], [*b"x"], [*b"that a single man"]]


def main() -> None:
    request = json.load(sys.stdin)
    config = config_from_dict(request["config"])
    params = random_params(config.model)
    _, shapes, axes = abstract_model(config.model)
    tokens = []
    for sizes in request["meshes"]:
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        mesh = make_mesh(MeshConfig(**sizes), devices)
        placed = jax.device_put(params, param_shardings(mesh, axes, shapes))
        generator = Generator(config, placed, ByteTokenizer(), mesh)
        drawn = generator.stream_tokens(PROMPTS, max_tokens=20, sampling=Sampling(0.7, 0, 0.9))
        tokens.append(np.concatenate(list(drawn), axis=1).tolist())
    json.dump(tokens, sys.stdout)


if __name__ == "__main__":
    main()
