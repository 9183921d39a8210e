"""What a sparse decoder makes of the last tokens of a text, all steps of a layer at once.

Under teacher forcing the tokens are known, and what a step chooses depends on queries and keys up
to its own alone. So the steps of one layer can be computed together, exactly as if they came one
after the other, and a text of T steps costs one forward pass of T tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from asa_jax.async_tls.model_layers import (
    build_model,
    cached_tokens,
    caches_of,
    finish,
    layers_of,
    project,
)
from asa_jax.async_tls.selection_masks import Budgets, Decoder, Steps, kept_tokens
from asa_jax.config import ModelConfig
from asa_jax.training.losses import token_scores

SCORED_TOKENS = 256  # whose logits exist at a time


class Figures(NamedTuple):
    """Means over the steps and heads of each sparse layer, float32 [layers].

    Attributes:
        mass: attention weight of the kept tokens, by full attention with the same queries.
        recall: share of the best tokens, as many as the budget, that are kept; see `kept_tokens`.
    """

    mass: Any
    recall: Any


class TailScores(NamedTuple):
    """What a model makes of the tokens behind each of T steps.

    Attributes:
        nll: negative log-likelihoods in nats, float32 [T].
        correct: whether the token is the argmax, bool [T].
        figures: of the sparse layers.
    """

    nll: Any
    correct: Any
    figures: Figures


class Simulation:
    """A model, the channels of its labels, and the layers that stay dense."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: Any,
        channels: Any,
        *,
        block_size: int,
        num_dense_layers: int,
    ) -> None:
        """Prepares; nothing is compiled.

        Args:
            cfg: the architecture, `prepared`.
            params: nested dict of its parameters.
            channels: int32 [layers, K, r], calibrated.
            block_size: tokens of a block.
            num_dense_layers: from the first on.
        """
        self._cfg, self._params = cfg, params
        self._layers = [nnx.split(layer) for layer in layers_of(build_model(cfg, params))]
        self._channels = jnp.asarray(channels)
        self._block_size, self._num_dense = block_size, num_dense_layers

    def score(
        self, cache: Any, tokens: Any, offset: int, decoder: Decoder, budgets: Budgets
    ) -> TailScores:
        """Decodes the last tokens of a text.

        Args:
            cache: of one row, S slots, a multiple of the block size, that hold `offset` tokens.
            tokens: int32 [T + 1], from position `offset` on; the last is only predicted.
            offset: position of the first.
            decoder: what is attended to in layers that are not dense.
            budgets: how much is kept.

        Returns:
            Scores of the T tokens behind the first.
        """
        tokens = jnp.asarray(tokens, jnp.int32)[None]
        x = _embed(self._params, tokens[:, :-1], cfg=self._cfg)
        figures = []
        for number, one in enumerate(caches_of(cache)):
            dense = number < self._num_dense
            x, of_layer = _decode_layer(
                *self._layers[number], x, one, jnp.int32(offset), self._channels[number], budgets,
                decoder="full" if dense else decoder, block_size=self._block_size,
            )  # fmt: skip
            figures += [] if dense else [of_layer]
        nll, correct = _score(self._params, x, tokens[:, 1:], cfg=self._cfg)
        return TailScores(nll, correct, jax.tree.map(lambda *of: jnp.stack(of), *figures))


@functools.partial(jax.jit, static_argnames="cfg")
def _embed(params: Any, tokens: jax.Array, *, cfg: ModelConfig) -> jax.Array:
    return build_model(cfg, params).embedding(tokens)


@functools.partial(jax.jit, static_argnames="cfg")
def _score(
    params: Any, x: jax.Array, targets: jax.Array, *, cfg: ModelConfig
) -> tuple[jax.Array, ...]:
    model = build_model(cfg, params)
    scores = token_scores(model.final_norm(x), model.unembedding(), targets, SCORED_TOKENS)
    return tuple(score[0] for score in scores)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("decoder", "block_size"))
def _decode_layer(
    graphdef: Any,
    params: Any,
    x: jax.Array,
    cache: Any,
    offset: jax.Array,
    channels: jax.Array,
    budgets: Budgets,
    *,
    decoder: Decoder,
    block_size: int,
) -> tuple[jax.Array, Figures]:
    """Hidden states [1, T, D] after a layer whose steps choose what they attend to."""
    layer = nnx.merge(graphdef, params)
    positions = offset + jnp.arange(x.shape[1])
    new, scale = project(layer, x, positions[None]), layer.attention.scale
    key, value = cached_tokens(cache)
    key = _append(key, new.key, offset)
    if value is None:
        value = key[..., : layer.attention.cfg.kv_lora_rank]
    else:
        value = _append(value, new.value, offset)
    query = new.query[0]
    weights = _dense_weights(query, key, positions, scale)
    steps = Steps(query, key, positions, weights)
    kept, recall = kept_tokens(
        steps, channels, budgets, decoder=decoder, scale=scale, block_size=block_size
    )
    weights = jnp.where(kept[:, :, None], weights, 0)
    mass = weights.sum(-1)
    mixed = jnp.einsum(
        "TKGS,SKH->TKGH", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    mixed = (mixed / mass[..., None]).astype(x.dtype)
    mixed = mixed.reshape(1, *query.shape[:2], -1)
    return finish(layer, x, mixed), Figures(mass.mean(), recall)


def _append(old: jax.Array, new: jax.Array, offset: jax.Array) -> jax.Array:
    """The tokens [S, K, H] of the only row, with new ones from a position on."""
    return jax.lax.dynamic_update_slice_in_dim(old[0], new[0], offset, 0)


def _dense_weights(
    query: jax.Array, key: jax.Array, positions: jax.Array, scale: float
) -> jax.Array:
    """Softmax of the scores over the tokens up to each query: float32 [T, K, G, S]."""
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    scores = jnp.einsum("TKGH,SKH->TKGS", grouped, key, preferred_element_type=jnp.float32)
    seen = (jnp.arange(len(key)) <= positions[:, None])[:, None, None]
    return jax.nn.softmax(scale * scores, axis=-1, where=seen)
