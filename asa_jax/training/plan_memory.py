"""Memory of one device by cause, without a device.

What is kept between steps is exact: the shapes and shardings of the state. What a step needs beside
it is counted on the traced step of the device's share (`plan_fusion`). The optimizer updates the
state where it lies and adds nothing to the gradients that the layers leave.
"""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh

from asa_jax.config import Config
from asa_jax.training.plan_share import Share, local_config
from asa_jax.training.step import BATCH, TrainState


def memory_by_cause(
    config: Config, mesh: AbstractMesh, state: TrainState, share: Share
) -> dict[str, float]:
    """Bytes on one device when most exist.

    Args:
        config: the run.
        mesh: its mesh.
        state: of `make_trainer`, with shardings.
        share: what a device does.

    Returns:
        By cause: what lies there between steps first, then what a step adds at its peak.
    """
    local, parts = local_config(config, mesh.shape), config.batch_parts(mesh.shape)
    tokens = local.data.batch_size * local.data.sequence_length
    parameters = tree_bytes(state.params)
    sums = {"gradients of earlier parts of the batch": parameters} if parts > 1 else {}
    return {
        "parameters": parameters,
        "moments": tree_bytes(state.opt_state),
        "batch": 4.0 * len(BATCH) * tokens * parts,
        **sums,
        **share.demand.causes,
    }


def tree_bytes(tree: Any) -> float:
    """On one device, of arrays with shardings."""

    def of(leaf: jax.ShapeDtypeStruct) -> float:
        assert leaf.sharding is not None
        return float(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)

    return sum(of(leaf) for leaf in jax.tree.leaves(tree))
