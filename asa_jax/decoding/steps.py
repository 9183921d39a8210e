"""The compiled steps of decoding: reading prompts, and drawing tokens one after another."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.decoding.sampling import sample_tokens
from asa_jax.decoding.settings import Sampling
from asa_jax.model.transformer import Transformer, abstract_model
from asa_jax.sharding import constrain

# Tokens of one dispatch: few enough to stream, many enough to hide what a dispatch costs.
STEPS_PER_DISPATCH = 16


class DecodeState(NamedTuple):
    """Where decoding is.

    Attributes:
        tokens: int32 [B], drawn and not read yet.
        positions: int32 [B], where they go in the cache.
        cache: of all tokens before them.
    """

    tokens: jax.Array
    positions: jax.Array
    cache: Any


@functools.partial(jax.jit, static_argnames=("cfg", "vocab_size", "cache_length"))
def start(
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    seed: jax.Array,
    sampling: Sampling,
    cfg: ModelConfig,
    vocab_size: int,
    cache_length: int,
) -> tuple[DecodeState, jax.Array]:
    """Reads prompts into an empty cache and draws the first token of each row.

    Args:
        params: nested dict of parameters.
        prompts: int32 [B, T], row b lengths[b] tokens, then anything.
        lengths: int32 [B].
        seed: uint32 [].
        sampling: traced settings.
        cfg: the architecture.
        vocab_size: tokens of the tokenizer; the model may have more, which are never drawn.
        cache_length: tokens that a row of the cache holds, at least T.

    Returns:
        The state, and the tokens int32 [B, 1].
    """
    model = nnx.merge(abstract_model(cfg)[0], params)
    cache = model.init_cache(prompts.shape[0], cache_length)
    prompts = constrain(prompts, "batch", "sequence")
    hidden, cache = model.prefill(prompts, lengths, cache)
    tokens = _draw(model, hidden, lengths, seed, sampling, vocab_size)
    return DecodeState(tokens, lengths, cache), tokens[:, None]


@functools.partial(jax.jit, static_argnames=("cfg", "vocab_size"), donate_argnames=("state",))
def advance(
    params: Any,
    state: DecodeState,
    *,
    seed: jax.Array,
    sampling: Sampling,
    cfg: ModelConfig,
    vocab_size: int,
) -> tuple[DecodeState, jax.Array]:
    """Reads the tokens of the state and draws the next ones; arguments as in `start`.

    Returns:
        The state, and the tokens int32 [B, STEPS_PER_DISPATCH].
    """
    model = nnx.merge(abstract_model(cfg)[0], params)

    def step(state: DecodeState, _: None) -> tuple[DecodeState, jax.Array]:
        hidden, cache = model.decode(state.tokens, state.positions, state.cache)
        positions = state.positions + 1
        tokens = _draw(model, hidden, positions, seed, sampling, vocab_size)
        return DecodeState(tokens, positions, cache), tokens

    state, tokens = jax.lax.scan(step, state, length=STEPS_PER_DISPATCH)
    return state, tokens.T


def _draw(
    model: Transformer,
    hidden: jax.Array,
    positions: jax.Array,
    seed: jax.Array,
    sampling: Sampling,
    vocab_size: int,
) -> jax.Array:
    """Draws the tokens [B] of positions [B] after hidden states [B, D]."""
    logits = jnp.einsum(
        "BD,DV->BV", hidden, model.unembedding(), preferred_element_type=jnp.float32
    )
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    rows = jnp.arange(positions.shape[0])
    fold = jax.vmap(jax.random.fold_in)
    keys = fold(fold(jnp.broadcast_to(jax.random.key(seed), rows.shape), rows), positions)
    # Whole on every device, so that every process can read them.
    return constrain(sample_tokens(logits, keys, sampling), "activation")
