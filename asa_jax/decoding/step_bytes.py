"""Bytes that a step of decoding cannot do without: of weights, and of what it reads of a cache."""

import dataclasses
from typing import Any

import jax

from asa_jax.config import ModelConfig
from asa_jax.decoding.cache_bytes import cache_shapes, tree_bytes
from asa_jax.model.param_layout import matrices_in_compute_dtype
from asa_jax.model.transformer import abstract_model

# What a layer with lists of blocks reads where they say, by the names of the cache's fields.
_LISTED = (("latent",), ("tokens", "key"), ("tokens", "value"))


def serving_shapes(cfg: ModelConfig) -> tuple[ModelConfig, Any]:
    """The architecture with layers in a list, and shapes of the parameters as decoding holds them.

    Args:
        cfg: the architecture.
    """
    listed = dataclasses.replace(cfg, scan_layers=False)
    _, shapes, _ = abstract_model(listed)
    return listed, jax.eval_shape(lambda params: matrices_in_compute_dtype(listed, params), shapes)


def weight_bytes(cfg: ModelConfig, params: Any) -> int:
    """Bytes of the parameters that a step reads: all but an embedding that is only looked up.

    Args:
        cfg: the architecture.
        params: nested dict of parameters as decoding holds them, or of their shapes.
    """
    table = params["embedding"]["table"]
    return tree_bytes(params) - (0 if cfg.tie_embeddings else tree_bytes(table))


def read_bytes(cfg: ModelConfig, batch: int, context: int) -> int:
    """Bytes of caches that a step needs, of `batch` rows of `context` tokens each.

    Rings, summaries and, without lists of blocks, tokens are needed whole; with lists the tokens
    of listed blocks.

    Args:
        cfg: the architecture.
        batch: rows.
        context: tokens of a row.
    """
    shapes = cache_shapes(dataclasses.replace(cfg, scan_layers=False), batch, context)
    leaves = [
        (path[:2], tuple(entry.name for entry in path[2:]), tree_bytes(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    ]
    with_list = {layer for layer, fields, _ in leaves if fields == ("block_indices",)}
    return round(
        sum(
            nbytes * (_listed_share(fields, cfg, context) if layer in with_list else 1)
            for layer, fields, nbytes in leaves
        )
    )


def _listed_share(fields: tuple[str, ...], cfg: ModelConfig, context: int) -> float:
    """How much of an array of a layer with lists a step needs."""
    share = cfg.num_selected_blocks * cfg.selection_block_size / context
    if fields == ("rope_key",):
        # Each group of latents lists other blocks; all share the rotated keys.
        share *= cfg.num_latent_groups
    return min(1.0, share) if fields in (*_LISTED, ("rope_key",)) else 1.0
