"""Where the parameters of a model's layers lie, and other forms of the same parameters.

The layers after those without experts are repetitions of the shortest period of their kinds. Their
parameters are a list of groups, one for each repetition, or with `scan_layers` a stack of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from asa_jax.config import ModelConfig


def shortest_period(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest tuple whose repetition is `kinds`."""
    for size in range(1, len(kinds) + 1):
        if len(kinds) % size == 0 and kinds[:size] * (len(kinds) // size) == kinds:
            return kinds[:size]
    return kinds


def split_kinds(cfg: ModelConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The kinds of the dense layers that precede those with experts, and of the rest."""
    size = cfg.experts.num_dense_layers if cfg.experts.num_experts else 0
    return cfg.layer_kinds[:size], cfg.layer_kinds[size:]


def layer_places(cfg: ModelConfig) -> list[tuple[tuple[str | int, ...], int | None]]:
    """Where each layer's parameters lie: its path, and its number in the stack, None without."""
    first, rest = split_kinds(cfg)
    period = len(shortest_period(rest))
    places: list[tuple[tuple[str | int, ...], int | None]] = [
        (("prefix", "layers", i), None) for i in range(len(first))
    ]
    for group, layer in (divmod(i, period) for i in range(len(rest))):
        stacked = ("groups", "layers", layer), group
        listed = ("groups", group, "layers", layer), None
        places.append(stacked if cfg.scan_layers else listed)
    return places


def listed_layers(cfg: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The same model with a list of layers in the place of a stack of them.

    Its caches are arrays of their own, which a step of decoding reads and writes where they are; a
    scan takes those of each layer from the stack, and puts them back, by copies.

    Args:
        cfg: the architecture.
        params: nested dict of its parameters.

    Returns:
        The architecture without scan, and its parameters.
    """
    if not cfg.scan_layers:
        return cfg, params
    stacked = params["groups"]
    repeats = jax.tree.leaves(stacked)[0].shape[0]

    @jax.jit
    def unstack(stacked: Any) -> dict[int, Any]:
        return {i: jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(repeats)}

    listed = dataclasses.replace(cfg, scan_layers=False)
    return listed, {**params, "groups": unstack(stacked)}


def matrices_in_compute_dtype(cfg: ModelConfig, params: Any) -> Any:
    """Casts once what the model casts wherever it is used, so that decoding reads half the bytes.

    Args:
        cfg: the architecture.
        params: nested dict of its parameters, layers in a list.

    Returns:
        The same, with matrices in the compute dtype but for those of routers, which are used as
        they are.
    """
    dtype = jnp.dtype(cfg.compute_dtype)

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        of_router = any(entry.key == "router" for entry in path)
        return x if x.ndim < 2 or of_router else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
