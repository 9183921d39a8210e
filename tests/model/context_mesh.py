"""Runs attention layers on meshes of 8 simulated devices; started by test_context_parallel.py.

Reads {"layer": [[data, fsdp, tensor, context], ...]} from the command line and prints for each the
largest errors of output and gradients against one device, relative to the largest element.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.config import MeshConfig
from asa_jax.context_parallel import place_rows, row_order
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import MESH_AXES, batch_sharding, make_mesh, param_shardings
from tests.model.layer_cases import LAYERS as PLAIN
from tests.model.layer_cases import LayerCase, inputs, make_case

# At a context of 8 a chunk holds 16 tokens.
BATCH, LENGTH = 4, 256
# What no other layer covers: a window over several chunks, and more shards than latents.
LAYERS = PLAIN | {
    "sliding_far": ("sliding", {"window_size": 40}),
    "local_far": ("local", {"window_size": 40}),
    "global_eight_heads": ("global", {"num_heads": 8, "num_latent_groups": 4}),
}


def main(cases: dict[str, list[list[int]]]) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    results = {}
    for name, meshes in cases.items():
        kind, overrides = LAYERS[name]
        case = make_case(kind, **overrides)
        expected = compute(case, None)
        for sizes in meshes:
            errors = jax.tree.map(error, compute(case, sizes), expected)
            results[f"{name} {sizes}"] = dict(
                output=errors[0], params=max(jax.tree.leaves(errors[1])), x=errors[2]
            )
    print(json.dumps(results))


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def compute(case: LayerCase, sizes: list[int] | None) -> tuple[Any, Any, Any]:
    """The output of a layer and the gradients of parameters and inputs, on a mesh or without."""
    x, (positions, segment_ids) = inputs(case, BATCH, LENGTH), packed_rows()
    weights = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    def loss(params, x, weights, *row):
        output = case.apply(params, x, *row)
        return jnp.sum(output * weights), output

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    if sizes is None:
        (_, output), gradients = step(case.params, x, weights, positions, segment_ids)
        return jax.tree.map(np.asarray, (output, *gradients))
    context = sizes[3]
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))), devices)
    _, shapes, axes = abstract_model(case.cfg)
    shardings = param_shardings(mesh, axes, shapes)["groups"][0]["layers"][0]["attention"]
    placed = [place_rows(array, context) for array in (x, weights, positions)]
    with jax.set_mesh(mesh):
        arrays = jax.device_put(placed, batch_sharding(mesh))
        params = jax.device_put(case.params, shardings)
        (_, output), (d_params, d_x) = step(params, *arrays, segment_ids)
    order = row_order(LENGTH, context)
    rows = (np.asarray(array)[:, order] for array in (output, d_x))
    return next(rows), jax.tree.map(np.asarray, d_params), next(rows)


def packed_rows() -> tuple[np.ndarray, np.ndarray]:
    """Positions and segment ids; documents that lie across chunks, and padding at the end."""
    starts = {0: (0,), 1: (0, 48), 2: (0, 16, 112, 176), 3: (0, 96)}
    positions, segment_ids = np.zeros((2, BATCH, LENGTH), np.int32)
    for row, begins in starts.items():
        for document, (start, end) in enumerate(
            zip(begins, (*begins[1:], LENGTH), strict=True), start=1
        ):
            segment_ids[row, start:end] = document
            positions[row, start:end] = np.arange(end - start)
    segment_ids[2, 230:], positions[2, 230:] = 0, 0
    return positions, segment_ids


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
