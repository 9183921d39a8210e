"""Exact attention of one query a row to a list of tokens."""

import jax
import jax.numpy as jnp

from pallas_kernels.async_tls_attention import async_tls_attention
from pallas_kernels.dispatch import Implementation


def attend_rows(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array, scale: float
) -> jax.Array:
    """Softmax attention to gathered tokens, summed in float32.

    Args:
        query: [B, N, H].
        key: [B, K, S', H].
        value: [B, K, S', h].
        valid: bool [B, K, S'], which of the tokens there are.
        scale: factor on the scores.

    Returns:
        [B, N, h] in query's dtype; zero where there is no token.
    """
    grouped = query.reshape(*valid.shape[:2], -1, query.shape[2])
    scores = scale * jnp.einsum("BKGH,BKSH->BKGS", grouped, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1, where=valid[:, :, None])
    # Tokens that are not valid may hold anything, NaN too.
    value = jnp.where(valid[..., None], value, 0)
    output = jnp.einsum(
        "BKGS,BKSH->BKGH", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return output.reshape(*query.shape[:2], -1).astype(query.dtype)


def attend_tokens(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    scale: float,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Softmax attention to the tokens of a cache at the given positions.

    Args:
        query: [B, N, H].
        key: [B, S, K, H].
        value: [B, S, K, h].
        positions: int32 [B, K, S'], -1 for none.
        scale: factor on the scores.
        implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
        [B, N, h] in query's dtype; zero where there is no token.
    """
    output, _ = async_tls_attention(
        query, key, value, positions, scale=scale, implementation=implementation
    )
    return output
