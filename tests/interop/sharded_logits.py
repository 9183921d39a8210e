"""Logits of an imported model on a mesh of simulated devices; a child of test_huggingface.py.

Reads {"folder": ..., "tokens": [...]} from stdin, writes the logits of the tokens, twice as rows.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asa_jax.config import MeshConfig
from asa_jax.interop.huggingface import load_model
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import batch_sharding, make_mesh


def main() -> None:
    request = json.load(sys.stdin)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=1), jax.devices()[:4])
    cfg, params, _ = load_model(request["folder"], mesh)
    up = params["groups"]["layers"][0]["mlp"]["up"]
    assert [part.data.shape for part in up.addressable_shards] == [(1, 8, 16, 6)] * 4

    @jax.jit
    def forward(params: dict, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(abstract_model(cfg)[0], params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model(tokens, positions, jnp.ones_like(tokens)) @ model.unembedding()

    tokens = jax.device_put(np.array([request["tokens"]] * 2), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        json.dump(np.asarray(forward(params, tokens)).tolist(), sys.stdout)


if __name__ == "__main__":
    main()
