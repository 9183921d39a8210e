"""Draws a token a row from logits: greedy, temperature, top-k, top-p, min-p, repetition penalty.

Settings are traced, so one compiled program serves them all.
"""

import jax
import jax.numpy as jnp

from asa_jax.decoding.settings import Sampling


def sample_tokens(
    logits: jax.Array, seen: jax.Array, keys: jax.Array, sampling: Sampling
) -> jax.Array:
    """Draws one token a row.

    Args:
        logits: float32 [B, V].
        seen: bool [B, V], the tokens that a row has.
        keys: typed PRNG keys [B]; a row is drawn from its own, whatever else is in the batch.
        sampling: settings of all rows, as numbers or scalar arrays.

    Returns:
        int32 [B].
    """
    logits = penalise(logits, seen, sampling.repetition_penalty)

    def greedy() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        # From the largest logit down, so that a low temperature cannot overflow.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
        kept = jax.lax.cond(
            (sampling.top_k > 0) | (sampling.top_p < 1),
            lambda: truncate(scaled, sampling.top_k, sampling.top_p),
            lambda: scaled,
        )
        # Logits are logarithms of how many times less likely a token is than the first (min-p,
        # arXiv 2407.01082).
        kept = jnp.where(scaled >= jnp.log(sampling.min_p), kept, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, greedy)


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Makes the tokens in `seen` [B, V] less likely (CTRL, arXiv 1909.05858): float32 [B, V]."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(
    logits: jax.Array, top_k: jax.Array | int = 0, top_p: jax.Array | float = 1.0
) -> jax.Array:
    """Keeps the logits of the most likely tokens: top-k first, then top-p of what that leaves.

    Top-p (nucleus sampling, arXiv 1904.09751) keeps a token while those more likely hold less than
    top_p together, so at least one. Ties go to the lower token id.

    Args:
        logits: float32 [B, V].
        top_k: number of tokens to keep; 0: all.
        top_p: probability to keep, in (0, 1].

    Returns:
        float32 [B, V], -inf for the rest.
    """
    vocab_size = logits.shape[-1]
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    within_k = jnp.arange(vocab_size) < jnp.where(top_k > 0, top_k, vocab_size)
    descending = jnp.take_along_axis(logits, order, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1, where=within_k)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The sum may round to 1 before the last token.
    within_p = (before < top_p) | (jnp.asarray(top_p) >= 1)
    keep = jnp.put_along_axis(
        jnp.zeros(logits.shape, bool), order, within_k & within_p, axis=-1, inplace=False
    )
    return jnp.where(keep, logits, -jnp.inf)
