"""Softmax attention under an explicit mask: the step in which every reference ends.

With s = scale * q . k, p = exp(s - lse) and o = sum p v, the gradient is written out as it is in
the kernels: delta = do . o - dlse, ds = p * (do . v - delta), dq = scale * ds k, dk = scale * ds q,
dv = p do. It needs o and lse of the forward pass but not the scores, which are computed anew; and
it is about twice as fast on a CPU as the gradient that JAX derives.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# A rematerialisation policy that saves these names spares the gradient the forward pass.
RESIDUAL_NAMES = ("attention_output", "attention_lse", "attention_blocks")

Residuals = tuple[jax.Array, ...]


def statistics_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the type of softmax statistics and of sums: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def to_rows(heads: jax.Array, num_kv_heads: int) -> jax.Array:
    """Gathers the query heads of a key head: [B, T, N, ...] -> [B, K, T * G, ...]."""
    batch, length, num_heads, *rest = heads.shape
    group = num_heads // num_kv_heads
    split = heads.reshape(batch, length, num_kv_heads, group, *rest).swapaxes(1, 2)
    return split.reshape(batch, num_kv_heads, length * group, *rest)


def from_rows(rows: jax.Array, length: int) -> jax.Array:
    """Undoes `to_rows`: [B, K, T * G, ...] -> [B, T, N, ...]."""
    batch, num_kv_heads, num_rows, *rest = rows.shape
    group = num_rows // length
    split = rows.reshape(batch, num_kv_heads, length, group, *rest).swapaxes(1, 2)
    return split.reshape(batch, length, num_kv_heads * group, *rest)


def matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiplies matrices in the type of `left`, summing in float32 or better."""
    return jnp.matmul(
        left, right.astype(left.dtype), preferred_element_type=statistics_dtype(left.dtype)
    )


def attention_scores(query: jax.Array, key: jax.Array, scale: float) -> jax.Array:
    """Scores of query [B, T, N, H] and key [B, S, K, H], as rows [B, K, T * G, S]."""
    return scale * matmul(to_rows(query, key.shape[2]), key.transpose(0, 2, 3, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def masked_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Attends to the visible keys.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, h].
      visible: bool [B or 1, K or 1, T, S].
      scale: Factor of the scores.

    Returns:
      Output [B, T, N, h] in query's dtype, log-sum-exp [B, T, N] in float32 or better. A row that
      sees no key has output 0, lse -inf and gradient 0.
    """
    return _forward(query, key, value, visible, scale)[0]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, scale: float
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    length = query.shape[1]
    scores = attention_scores(query, key, scale)
    scores = jnp.where(_visible_rows(visible, scores), scores, -jnp.inf)
    maximum = scores.max(-1, keepdims=True, initial=-jnp.inf)
    maximum = jnp.where(maximum > -jnp.inf, maximum, 0)  # -inf - -inf would be NaN
    weights = jnp.exp(scores - maximum)
    total = weights.sum(-1, keepdims=True)
    output = matmul(weights.astype(query.dtype), value.swapaxes(1, 2))
    output /= jnp.where(total > 0, total, 1)
    output = checkpoint_name(from_rows(output.astype(query.dtype), length), RESIDUAL_NAMES[0])
    lse = from_rows((maximum + jnp.log(total))[..., 0], length)
    lse = checkpoint_name(lse, RESIDUAL_NAMES[1])
    return (output, lse), (query, key, value, visible, output, lse)


def _backward(
    scale: float, residuals: Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    query, key, value, visible, output, lse = residuals
    doutput, dlse = cotangents
    sees_any = lse > -jnp.inf
    lse = jnp.where(sees_any, lse, 0)
    delta = (doutput.astype(lse.dtype) * output).sum(-1) - jnp.where(sees_any, dlse, 0)
    length, num_kv_heads = query.shape[1], key.shape[2]
    lse, delta = (to_rows(x[..., None], num_kv_heads) for x in (lse, delta))
    query_rows, doutput_rows = (to_rows(x, num_kv_heads) for x in (query, doutput))
    weights = jnp.exp(attention_scores(query, key, scale) - lse)
    weights = jnp.where(_visible_rows(visible, weights), weights, 0)
    dweights = matmul(doutput_rows, value.transpose(0, 2, 3, 1))
    dscores = (scale * weights * (dweights - delta)).astype(query.dtype)
    dquery = from_rows(matmul(dscores, key.swapaxes(1, 2)), length)
    # Sums over rows have the small factor on the left: to transpose weights or dscores is slow.
    dkey = matmul(query_rows.swapaxes(2, 3), dscores).transpose(0, 3, 1, 2)
    dvalue = matmul(doutput_rows.swapaxes(2, 3), weights).transpose(0, 3, 1, 2)
    return dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype), None


def _visible_rows(visible: jax.Array, rows: jax.Array) -> jax.Array:
    """Repeats a mask [B or 1, K or 1, T, S] for the query heads of each key head."""
    return jnp.repeat(visible, rows.shape[2] // visible.shape[2], axis=2)


masked_attention.defvjp(_forward, _backward)
