"""AdamW and Muon with warm-up schedules, global-norm clipping and weight decay, all of optax."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from asa_jax.config import OptimizerConfig

# Axes along which parameters are stacked: each slice is a matrix of its own.
STACK_AXES = ("layers", "pair", "experts")
# Update size of Muon relative to its learning rate, that of AdamW (Moonlight, arXiv 2502.16982).
MUON_RMS = 0.2


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update n = 0, 1, ..., relative to the configured rate.

    Linear warm-up, then `cosine`: half a cosine down to the final ratio; `wsd`: constant, then
    linear to the final ratio over the last `decay_fraction` of the steps; `constant`.

    Args:
        config: schedule and warm-up.
        steps: updates of the whole run.

    Returns:
        A function from the number of updates done to a factor in (0, 1].
    """
    warmup, final = config.warmup_steps, config.final_learning_rate_ratio
    decay = min(round(config.decay_fraction * steps), steps - warmup)
    boundaries = [warmup]
    match config.schedule:
        case "cosine":
            after = [optax.cosine_decay_schedule(1.0, max(1, steps - warmup), final)]
        case "wsd":
            after = [
                optax.constant_schedule(1.0), optax.linear_schedule(1.0, final, max(1, decay))
            ]  # fmt: skip
            boundaries.append(steps - decay)
        case _:
            after = [optax.constant_schedule(1.0)]
    warm = optax.linear_schedule(0.0, 1.0, max(1, warmup))
    joined = optax.join_schedules([warm, *after], boundaries)
    # The first update, with no update done, takes the first value above zero.
    return lambda done: joined(done + 1)


def make_optimizer(config: OptimizerConfig, steps: int, axes: Any) -> optax.GradientTransformation:
    """The optimizer of a run: clip by global norm, then AdamW or Muon.

    AdamW decays matrices and embeddings, not norm scales. Muon takes and decays the matrices inside
    the layers; the rest (embeddings, unembedding, norms, gates) goes to Adam with Nesterov momentum
    and `adam_learning_rate`, undecayed.

    Args:
        config: optimizer and schedule.
        steps: updates of the whole run.
        axes: logical axes of the parameters, a tree of tuples of names.

    Returns:
        The transformation of gradients into updates.
    """
    factor = learning_rate_schedule(config, steps)
    main = optimizer_rate(factor, config.learning_rate)
    if config.name == "adamw":
        rule = optax.adamw(
            main, b1=config.b1, b2=config.b2, eps=config.epsilon,
            weight_decay=config.weight_decay, mask=_map_axes(_is_decayed, axes),
        )  # fmt: skip
    else:
        rule = optax.contrib.muon(
            main, beta=config.b1, weight_decay=config.weight_decay, consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=_map_axes(matrix_axes, axes),
            adam_b1=config.b1, adam_b2=config.b2, eps=config.epsilon,
            adam_learning_rate=optimizer_rate(factor, config.adam_learning_rate),
        )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def optimizer_rate(factor: optax.Schedule, rate: float) -> optax.Schedule:
    """Scales a schedule."""
    return lambda done: rate * factor(done)


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
