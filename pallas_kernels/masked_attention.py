"""Softmax attention under an explicit mask: the step that every reference implementation ends in."""

import jax
import jax.numpy as jnp


def split_heads(query: jax.Array, num_kv_heads: int) -> jax.Array:
    """Splits query heads by the key head they read: [..., N, H] -> [..., K, G, H]."""
    return query.reshape(*query.shape[:-2], num_kv_heads, -1, query.shape[-1])


def merge_heads(rows: jax.Array) -> jax.Array:
    """Undoes `split_heads`: [..., K, G, h] -> [..., N, h]."""
    return rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])


def attention_scores(query: jax.Array, key: jax.Array, scale: float) -> jax.Array:
    """Scores [B, K, T, G, S] of query [B, T, K, G, H] and key [B, S, K, H], at least float32."""
    statistics = jnp.promote_types(query.dtype, jnp.float32)
    return scale * jnp.einsum("BTKGH,BSKH->BKTGS", query, key, preferred_element_type=statistics)


def masked_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Attention over the visible keys; a row that sees none has output 0, lse -inf, finite gradients.

    Args:
      query: [B, T, K, G, H].
      key: [B, S, K, H].
      value: [B, S, K, h].
      visible: bool, broadcasts to [B, K, T, G, S].
      scale: Factor of the scores.

    Returns:
      Output [B, T, K, G, h] in query's dtype, lse [B, T, K, G] in at least float32.
    """
    scores = jnp.where(visible, attention_scores(query, key, scale), -jnp.inf)
    maximum = jax.lax.stop_gradient(scores.max(-1, keepdims=True, initial=-jnp.inf))
    maximum = jnp.where(jnp.isfinite(maximum), maximum, 0)  # -inf - -inf would be NaN
    weights = jnp.exp(scores - maximum)
    total = weights.sum(-1)
    sees_any = total > 0
    total = jnp.where(sees_any, total, 1)  # before log and division: their gradient stays finite
    output = jnp.einsum(
        "BKTGS,BSKh->BKTGh",
        weights.astype(value.dtype),
        value,
        preferred_element_type=weights.dtype,
    )
    output = (output / total[..., None]).astype(query.dtype)
    lse = jnp.where(sees_any, maximum[..., 0] + jnp.log(total), -jnp.inf)
    return output.transpose(0, 2, 1, 3, 4), lse.transpose(0, 2, 1, 3)
