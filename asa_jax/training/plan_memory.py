"""Memory of one device by cause, without a device.

What is kept between steps is exact: the shapes and shardings of the state. What the backward pass
keeps is traced (`plan_share`). How much more exists while one group of layers runs backwards, or
while the optimizer runs, is XLA's choice; two factors stand for it.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from asa_jax.config import Config
from asa_jax.model.transformer import shortest_period
from asa_jax.training.plan_share import BATCH, Share, local_config
from asa_jax.training.step import TrainState

# Fitted to XLA's own account of steps compiled for a CPU (tests/training/test_plan.py holds the
# plan to it): cotangents beside what one group of layers computed anew, and copies of gradient and
# moments while the optimizer runs. Not yet compared with a GPU's.
BACKWARD_FACTOR = 1.3
OPTIMIZER_FACTOR = 3.2
# Of one chunk of the loss: logits, probabilities and their gradient.
LOGITS_ARRAYS = 3


def memory_by_cause(
    config: Config, mesh: AbstractMesh, state: TrainState, share: Share
) -> dict[str, dict[str, float]]:
    """Bytes on one device.

    Args:
        config: the run.
        mesh: its mesh.
        state: of `make_trainer`, with shardings.
        share: what a device does.

    Returns:
        `always`: by cause, what exists in every phase; `loss`, `layers` and `optimizer`: what each
        phase of a step adds.
    """
    local, parts = local_config(config, mesh.shape), config.batch_parts(mesh.shape)
    gradients = _bytes(state.params)
    tokens = local.data.batch_size * local.data.sequence_length
    width = jnp.dtype(config.model.compute_dtype).itemsize
    chunk = min(config.training.loss_chunk_tokens, tokens)
    hidden = tokens * config.model.hidden_size * width
    table = config.model.hidden_size * local.model.vocab_size
    group = share.kept_bytes * len(shortest_period(config.model.layer_kinds))
    group //= config.model.num_layers
    accumulated = {"gradients of earlier parts": gradients} if parts > 1 else {}
    return {
        "always": {
            "parameters": _bytes(state.params),
            "moments": _bytes(state.opt_state),
            "batch": 4.0 * len(BATCH) * tokens * parts,
            **accumulated,
        },
        "loss": {
            "activations kept": share.kept_bytes,
            "hidden states and their gradient": 2 * hidden,
            "logits of a chunk": LOGITS_ARRAYS * 4.0 * chunk * local.model.vocab_size,
            "unembedding and its gradient": table * (width + 4.0),
        },
        "layers": {
            "gradients": gradients,
            "activations kept": share.kept_bytes,
            "hidden states and their gradient": 2 * hidden,
            "one group of layers": BACKWARD_FACTOR * max(0, share.group_bytes - group),
            "its weights, gathered": _gathered_bytes(config, mesh, state),
        },
        "optimizer": {"gradients and updates": OPTIMIZER_FACTOR * gradients},
    }


def peak(memory: Mapping[str, Mapping[str, float]]) -> tuple[str, float]:
    """The phase of a step that needs most, and its bytes."""
    phases = {name: sum(parts.values()) for name, parts in memory.items() if name != "always"}
    phase = max(phases, key=phases.__getitem__)
    return phase, sum(memory["always"].values()) + phases[phase]


def _bytes(tree: Any) -> float:
    """On one device, of arrays with shardings."""

    def of(leaf: jax.ShapeDtypeStruct) -> float:
        assert leaf.sharding is not None
        return float(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)

    return sum(of(leaf) for leaf in jax.tree.leaves(tree))


def _gathered_bytes(config: Config, mesh: AbstractMesh, state: TrainState) -> float:
    """Weights of one group of layers and their gradients before they are divided by `fsdp`."""
    if mesh.shape["fsdp"] == 1:
        return 0.0
    period = len(shortest_period(config.model.layer_kinds))
    layers = _bytes(state.params["groups"]) * mesh.shape["fsdp"] * period / config.model.num_layers
    return layers / 4 * jnp.dtype(config.model.compute_dtype).itemsize * 2
