"""Every kind of attention layer with its variants, small enough to run all of them in each test."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.model.transformer import make_attention
from tests.models import random_params, tiny_model_config

# The sizes of the NSA paper, divided by 4: blocks overlap and do not coincide with selected ones.
PAPER_BLOCKS = {
    "compression_block_size": 8,
    "compression_stride": 4,
    "selection_block_size": 16,
    "num_selected_blocks": 4,
    "queries_per_selection": 1,
}

# Layer kind and the model fields that differ.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "mla": ("mla", {"q_lora_rank": 12}),
    "sliding": ("sliding", {}),
    "local": ("local", {}),
    "global": ("global", {}),
    "global_one_latent": ("global", {"num_latent_groups": 1, "queries_per_selection": 1}),
    "nsa": ("nsa", {}),
    "nsa_shared": ("nsa", {"nsa_share_kv": True, **PAPER_BLOCKS}),
    "nsa_paper": ("nsa", {"nsa_compression": "mlp", **PAPER_BLOCKS}),
    "nsa_no_window": ("nsa", {"nsa_branches": ("compression", "selection")}),
    "nsa_no_selection": ("nsa", {"nsa_branches": ("compression", "window")}),
    "nsa_window_only": ("nsa", {"nsa_branches": ("window",)}),
}
NAMES = tuple(LAYERS)
SPARSE = tuple(name for name in NAMES if name.startswith(("global", "nsa")))


class LayerCase(NamedTuple):
    """`apply(params, x, positions, segment_ids)` is jitted."""

    cfg: ModelConfig
    apply: Callable[..., jax.Array]
    params: Any


@functools.cache
def layer_case(name: str) -> LayerCase:
    """The layer `name` of LAYERS with its weights; made once a process."""
    kind, overrides = LAYERS[name]
    return make_case(kind, **overrides)


def make_case(kind: str, **overrides: Any) -> LayerCase:
    """An attention layer whose weights are a nested dict."""
    cfg = tiny_model_config((kind,), **overrides)
    layer = nnx.eval_shape(lambda: make_attention(kind, cfg, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(layer)
    params = random_params(cfg)["groups"][0]["layers"][0]["attention"]

    def apply(params: Any, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(x, positions, segment_ids)

    return LayerCase(cfg, jax.jit(apply), params)


def inputs(case: LayerCase, batch: int, length: int, seed: int = 1) -> np.ndarray:
    """Normally distributed activations [batch, length, D]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, length, case.cfg.hidden_size)).astype(np.float32)


def one_document(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segment ids of rows that hold one document each."""
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    return positions, np.ones_like(positions)


def run(case: LayerCase, x: np.ndarray) -> np.ndarray:
    """The layer's output for rows that hold one document each."""
    return np.asarray(case.apply(case.params, x, *one_document(*x.shape[:2])))
