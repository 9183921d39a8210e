"""The layers of a model as AsyncTLS sees them: queries, keys and values in, mixed values out.

For absorbed latents there is one key head, whose key is [latent | rotated key] and whose value is
the latent; `value` is None then.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.model.cached_attention import write
from asa_jax.model.grouped_query_attention import GroupedQueryAttention, GroupedQueryCache
from asa_jax.model.latent_attention import LatentAttention, LatentCache
from asa_jax.model.param_layout import listed_layers, matrices_in_compute_dtype
from asa_jax.model.transformer import Layer, Transformer, abstract_model


class Projected(NamedTuple):
    """What attention takes of tokens.

    Attributes:
        query: [B, T, N, H].
        key: [B, T, K, H].
        value: [B, T, K, h], or None.
    """

    query: Any
    key: Any
    value: Any


def prepared(cfg: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """A model as it is decoded: layers in a list, matrices in the compute dtype."""
    cfg, params = listed_layers(cfg, params)
    return cfg, matrices_in_compute_dtype(cfg, params)


def build_model(cfg: ModelConfig, params: Any) -> Transformer:
    """The model of parameters with layers in a list."""
    return nnx.merge(abstract_model(cfg)[0], params)


def layers_of(model: Transformer) -> list[Layer]:
    """All layers, the first first."""
    groups = [*([] if model.prefix is None else [model.prefix]), *model.groups]
    return [layer for group in groups for layer in group.layers]


def caches_of(cache: Any) -> list[GroupedQueryCache | LatentCache]:
    """The caches of all layers, out of those of their groups."""
    return [one for group in cache for one in group]


def project(layer: Layer, x: jax.Array, positions: jax.Array) -> Projected:
    """What a layer's attention takes of hidden states [B, T, D] at positions [B, T]."""
    attention, normed = layer.attention, layer.attention_norm(x)
    if isinstance(attention, LatentAttention):
        query, latent, rope_key = attention.project_absorbed(normed, positions)
        return Projected(query, _latent_key(latent, rope_key), None)
    assert isinstance(attention, GroupedQueryAttention)  # by settings.key_shape
    return Projected(*attention.project(normed, positions))


def finish(layer: Layer, x: jax.Array, mixed: jax.Array) -> jax.Array:
    """Hidden states [B, T, D] after a layer, from those before and attention's [B, T, N, h]."""
    attention = layer.attention
    if isinstance(attention, LatentAttention):
        mixed = attention.value_up("BTNR,RNH->BTNH", mixed)
    x = x + attention.output("BTNH,NHD->BTD", mixed)
    return x + layer.mlp(layer.mlp_norm(x))


def cached_tokens(cache: GroupedQueryCache | LatentCache) -> tuple[jax.Array, Any]:
    """Keys [B, S, K, H] and values [B, S, K, h] or None that a cache holds."""
    if isinstance(cache, LatentCache):
        return _latent_key(*cache), None
    return cache.key, cache.value


def append_token(
    cache: GroupedQueryCache | LatentCache, new: Projected, position: jax.Array
) -> GroupedQueryCache | LatentCache:
    """The cache with one token [B, 1] a row at position [B]."""
    if isinstance(cache, LatentCache):
        latent, rope_key = jnp.split(new.key[:, 0, 0], [cache.latent.shape[-1]], axis=-1)
        return LatentCache(
            write(cache.latent, position, latent), write(cache.rope_key, position, rope_key)
        )
    return GroupedQueryCache(
        write(cache.key, position, new.key[:, 0]), write(cache.value, position, new.value[:, 0])
    )


def _latent_key(latent: jax.Array, rope_key: jax.Array) -> jax.Array:
    return jnp.concatenate([latent, rope_key], axis=-1)[:, :, None]
