"""Definition of decode_attention in XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.masked_attention import statistics_dtype


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    lengths: jax.Array,
    rope_key: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_attention`."""
    visible = jnp.arange(key.shape[1]) < lengths[:, None]
    rope_key = None if rope_key is None else rope_key[:, :, None]
    return attend_visible(query, key, value, rope_key, visible[:, None], scale)


def attend_visible(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    rope_key: jax.Array | None,
    visible: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the visible keys.

    Args:
      query: [B, N, H].
      key: [B, S, K, R].
      value: [B, S, K, h], or None: key.
      rope_key: [B, S, K or 1, H - R], or None.
      visible: bool [B, K or 1, S].
      scale: Factor of the scores.

    Returns:
      Output [B, N, h] in query's dtype and log-sum-exp [B, N]; 0 and -inf where nothing is visible.
    """
    value = key if value is None else value
    scores = decode_scores(query, key, rope_key, scale)
    scores = jnp.where(visible[:, :, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(lse > -jnp.inf, lse, 0)[..., None])
    output = jnp.einsum(
        "BKGS,BSKH->BKGH", weights.astype(value.dtype), value, preferred_element_type=lse.dtype
    )
    shape = query.shape[:2]
    return output.reshape(*shape, -1).astype(query.dtype), lse.reshape(shape)


def decode_scores(
    query: jax.Array, key: jax.Array, rope_key: jax.Array | None, scale: float
) -> jax.Array:
    """Scores [B, K, G, S] in float32 or better; arguments as `attend_visible`."""
    if rope_key is not None:
        rope_key = jnp.broadcast_to(rope_key, (*key.shape[:3], rope_key.shape[3]))
        key = jnp.concatenate([key, rope_key], axis=-1)
    grouped = query.reshape(query.shape[0], key.shape[2], -1, query.shape[2])
    sums = statistics_dtype(query.dtype)
    return scale * jnp.einsum("BKGH,BSKH->BKGS", grouped, key, preferred_element_type=sums)
