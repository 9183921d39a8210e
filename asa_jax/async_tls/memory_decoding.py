"""Sparse decoding of whole models with caches in device memory, which AsyncTLS is compared with.

The index is made anew from the cache whenever text was read, and grows with what is drawn.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from asa_jax.async_tls import decoders
from asa_jax.async_tls.index import append, init_index
from asa_jax.async_tls.model_layers import (
    append_token,
    cached_tokens,
    caches_of,
    finish,
    layers_of,
    project,
)
from asa_jax.async_tls.settings import DecodingConfig
from asa_jax.async_tls.token_attention import attend_cache
from asa_jax.model.transformer import Layer, Transformer

MemoryDecoder = Literal["quest", "double_sparsity", "oracle_topk"]
_SELECTIONS = {
    "quest": decoders.quest,
    "double_sparsity": decoders.double_sparsity,
    "oracle_topk": decoders.oracle_topk,
}


class SparseCache(NamedTuple):
    """What a step reads.

    Attributes:
        layers: caches of all layers.
        indexes: of the layers that are not dense.
        channels: int32 [layers, K, r], of all layers.
    """

    layers: Any
    indexes: Any
    channels: Any


@dataclasses.dataclass(frozen=True)
class SparseDecode:
    """Reads a token of each row; a `steps.DecodeFunction` over a `SparseCache`."""

    decoder: MemoryDecoder
    settings: DecodingConfig

    def __call__(
        self, model: Transformer, tokens: jax.Array, position: jax.Array, cache: SparseCache
    ) -> tuple[jax.Array, SparseCache]:
        """Maps tokens [B] at positions [B] to hidden states [B, D]."""
        x, num_dense = model.embedding(tokens), self.settings.num_dense_layers
        caches, indexes = [], []
        for number, (layer, one) in enumerate(zip(layers_of(model), cache.layers, strict=True)):
            if number < num_dense:
                x, one = layer.decode(x, position, one)
            else:
                index = cache.indexes[number - num_dense]
                x, one, index = self._layer(layer, x, position, one, index, cache.channels[number])
                indexes.append(index)
            caches.append(one)
        return model.final_norm(x), SparseCache(caches, indexes, cache.channels)

    def _layer(
        self, layer: Layer, x: jax.Array, position: jax.Array, cache: Any, index: Any, channels: Any
    ) -> tuple[jax.Array, Any, Any]:
        new = project(layer, x[:, None], position[:, None])
        cache = append_token(cache, new, position)
        # A row that has ended stays where it is; others are as long already.
        index = append(index._replace(lengths=position), new.key, channels)
        key, _ = cached_tokens(cache)
        query, scale = new.query[:, 0], layer.attention.scale
        implementation = layer.attention.cfg.implementation
        chosen = _SELECTIONS[self.decoder](
            query, key, index, channels, scale, self.settings.sizes, implementation
        )
        mixed = attend_cache(query, cache, chosen, scale, implementation)
        return finish(layer, x[:, None], mixed[:, None])[:, 0], cache, index


def start(
    cache: Any, lengths: jax.Array, channels: jax.Array, settings: DecodingConfig
) -> SparseCache:
    """Makes the indexes of what caches hold.

    Args:
        cache: of `Transformer.init_cache`, S a multiple of the block size.
        lengths: int32 [B], tokens that they hold.
        channels: int32 [layers, K, r].
        settings: sizes and dense layers.
    """
    layers = caches_of(cache)
    sparse = list(zip(layers, channels, strict=True))[settings.num_dense_layers :]

    def index_of(one: Any, chosen: jax.Array) -> Any:
        key, _ = cached_tokens(one)
        empty = init_index(
            *key.shape, num_channels=chosen.shape[1], block_size=settings.sizes.block_size,
            dtype=key.dtype,
        )  # fmt: skip
        return append(empty, key, chosen, lengths)

    return SparseCache(layers, [index_of(*pair) for pair in sparse], jnp.asarray(channels))


def stop(cache: Any, sparse: SparseCache) -> Any:
    """The caches of all layers in the groups of `cache`, as prefill takes them."""
    layers = iter(sparse.layers)
    return [[next(layers) for _ in group] for group in cache]
