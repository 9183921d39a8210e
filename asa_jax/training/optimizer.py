"""AdamW and Muon with warm-up schedules, global-norm clipping and weight decay, all of optax."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from optax.contrib import MuonDimensionNumbers

from asa_jax.config import OptimizerConfig

# Axes along which parameters are stacked: each slice is a matrix of its own.
STACK_AXES = ("layers", "pair", "experts")
# Update size of Muon relative to its learning rate, that of AdamW (Moonlight, arXiv 2502.16982).
MUON_RMS = 0.2


class Schedule(NamedTuple):
    """The numbers of a learning-rate schedule, float32.

    They are arguments of the compiled step, so that runs which differ in nothing else share it.

    Attributes:
        learning_rate, adam_learning_rate: the highest of the run.
        warmup_steps: updates of the linear warm-up; at least 1.
        decay_start: updates before the decay.
        decay_steps: updates of the decay; at least 1.
        final_ratio: of the rate after the decay to the highest.
    """

    learning_rate: ArrayLike
    adam_learning_rate: ArrayLike
    warmup_steps: ArrayLike
    decay_start: ArrayLike
    decay_steps: ArrayLike
    final_ratio: ArrayLike


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Returns the schedule of a run.

    Linear warm-up, then `cosine`: half a cosine down to the final ratio; `wsd`: constant, then
    linear to the final ratio over the last `decay_fraction` of the steps; `constant`.

    Args:
        config: schedule and warm-up.
        steps: updates of the whole run.
    """
    after, final = steps - config.warmup_steps, config.final_learning_rate_ratio
    match config.schedule:
        case "cosine":
            start, decay = config.warmup_steps, after
        case "wsd":
            decay = min(round(config.decay_fraction * steps), after)
            start = steps - decay
        case _:
            start, decay, final = steps, 1, 1.0
    numbers = (
        config.learning_rate, config.adam_learning_rate, max(1, config.warmup_steps),
        start, max(1, decay), final,
    )  # fmt: skip
    return Schedule(*map(np.float32, numbers))


def schedule_factor(schedule: Schedule, is_cosine: bool, done: ArrayLike) -> jax.Array:
    """Learning rate of the update after `done` others, relative to the highest; in (0, 1].

    Optax's own schedules take no traced numbers.
    """
    update = jnp.asarray(done, jnp.float32) + 1  # the first one has a rate above zero
    warm = jnp.minimum(update / schedule.warmup_steps, 1)
    progress = jnp.clip((update - schedule.decay_start) / schedule.decay_steps, 0, 1)
    left = (1 + jnp.cos(jnp.pi * progress)) / 2 if is_cosine else 1 - progress
    return warm * (schedule.final_ratio + (1 - schedule.final_ratio) * left)


def make_optimizer(
    config: OptimizerConfig,
    axes: Any,
    learning_rate: ArrayLike = 0.0,
    adam_learning_rate: ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """The optimizer of an update: clip by global norm, then AdamW or Muon.

    AdamW decays matrices and embeddings, not norm scales. Muon takes and decays the matrices inside
    the layers; the rest (embeddings, unembedding, norms, gates) goes to Adam with Nesterov momentum
    and its own rate, undecayed. The optimizer's state knows nothing of the rates.

    Args:
        config: optimizer.
        axes: logical axes of the parameters, a tree of tuples of names.
        learning_rate: of this update.
        adam_learning_rate: of this update, for what Muon leaves to Adam.

    Returns:
        The transformation of gradients into updates.
    """
    if config.name == "adamw":
        rule = optax.adamw(
            learning_rate, b1=config.b1, b2=config.b2, eps=config.epsilon,
            weight_decay=config.weight_decay, mask=_map_axes(_is_decayed, axes),
        )  # fmt: skip
    else:
        rule = optax.contrib.muon(
            learning_rate, beta=config.b1, weight_decay=config.weight_decay,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=_map_axes(matrix_axes, axes),
            adam_b1=config.b1, adam_b2=config.b2, eps=config.epsilon,
            adam_learning_rate=adam_learning_rate,
        )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def matrix_axes(axes: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """Which dimensions of a weight are the inputs and which the outputs of its matrix.

    Weights list the summed dimensions first: [D, N, H] maps D to N*H. Two or more are summed where
    the result is the residual stream ([N, H, D]) or the input a whole block ([l, H, R]).

    Args:
        axes: logical axis names of the weight; stacked ones are left out of the matrix.

    Returns:
        The dimensions, None for what is no matrix inside a layer.
    """
    dims = [i for i, name in enumerate(axes) if name not in STACK_AXES]
    names = [axes[i] for i in dims]
    # A learned position code or the bias of heads is added and not multiplied.
    is_added = len(names) == 2 and names[1] == "head_dim" and names[0] not in ("embed", "latent")
    if len(dims) < 2 or is_added or "vocab" in names or "gates" in names:
        return None
    inputs = len(dims) - 1 if names[-1] == "embed" or names[0] == "block" else 1
    return MuonDimensionNumbers(tuple(dims[:inputs]), tuple(dims[inputs:]))


def _is_decayed(axes: tuple[str, ...]) -> bool:
    return sum(name not in STACK_AXES for name in axes) >= 2


def _map_axes(function: Any, axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=lambda node: isinstance(node, tuple))
