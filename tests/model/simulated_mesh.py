"""Runs tiny models on meshes of 8 simulated CPU devices; started by `tests/test_sharding.py`.

Prints one JSON object: for each case the largest errors of the loss and of the gradients against
one device, relative to the largest gradient, and the fraction of the parameters on each device.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asa_jax.config import MeshConfig, ModelConfig
from asa_jax.context_parallel import place_rows
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import MESH_AXES, batch_sharding, make_mesh, param_shardings
from tests.model.layer_cases import one_document
from tests.models import random_params, tiny_model_config

BATCH, LENGTH = 8, 64


def main(cases: dict[str, tuple[list[str], list[int]]]) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    print(
        json.dumps({name: compare(tuple(kinds), sizes) for name, (kinds, sizes) in cases.items()})
    )


def compare(kinds: tuple[str, ...], sizes: list[int]) -> dict[str, float]:
    """Loss and gradients of a model on a mesh (data, fsdp, tensor, context) and on one device."""
    cfg = tiny_model_config(kinds, scan_layers=True)
    mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))))
    graphdef, shapes, axes = abstract_model(cfg)
    params = random_params(cfg)
    shardings = param_shardings(mesh, axes, shapes)
    with jax.set_mesh(mesh):
        step = jax.jit(
            functools.partial(loss_and_gradients, graphdef), out_shardings=(None, shardings)
        )
        sharded = jax.device_put(params, shardings)
        batch = [place_rows(rows, mesh.shape["context"]) for rows in make_batch(cfg)]
        batch = jax.device_put(batch, batch_sharding(mesh))
        loss, gradients = step(sharded, batch)
    expected_loss, expected = single_device(cfg)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    errors = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), gradients, expected)
    on_one = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(gradients))
    return {
        "loss": abs(float(loss) - expected_loss),
        "gradients": float(max(jax.tree.leaves(errors)) / largest),
        "held": on_one / sum(leaf.size for leaf in jax.tree.leaves(shapes)),
    }


@functools.cache
def single_device(cfg: ModelConfig) -> tuple[float, dict]:
    """Loss and gradients without a mesh."""
    graphdef, _, _ = abstract_model(cfg)
    params = random_params(cfg)
    loss, gradients = jax.jit(functools.partial(loss_and_gradients, graphdef))(
        params, make_batch(cfg)
    )
    return float(loss), jax.tree.map(np.asarray, gradients)


def make_batch(cfg: ModelConfig) -> tuple[np.ndarray, ...]:
    """Tokens, positions and segment ids; two documents in each row, the second across shards."""
    tokens = np.random.default_rng(0).integers(cfg.vocab_size, size=(BATCH, LENGTH))
    positions, segment_ids = one_document(BATCH, LENGTH)
    segment_ids[:, 16:], positions[:, 16:] = 2, positions[:, 16:] - 16
    return tokens.astype(np.int32), positions, segment_ids


def loss_and_gradients(graphdef, params, batch):
    """Mean negative log-likelihood of each token itself, and its gradients by the parameters."""

    def loss(params):
        model = nnx.merge(graphdef, params)
        logits = jnp.einsum("BTD,DV->BTV", model(*batch), model.unembedding())
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[0][..., None], axis=-1)
        return -jnp.mean(picked)

    return jax.value_and_grad(loss)(params)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
