"""Definition of async_tls_attention in XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.reference import attend_visible


def async_tls_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    positions: jax.Array,
    rope_key: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.async_tls_attention`; gathers the tokens."""
    rows = jnp.arange(positions.shape[0])[:, None, None]
    heads = jnp.arange(positions.shape[1])
    by_token = jnp.maximum(positions, 0).swapaxes(1, 2)
    key = key[rows, by_token, heads]
    value = None if value is None else value[rows, by_token, heads]
    rope_key = None if rope_key is None else rope_key[rows, by_token]
    return attend_visible(query, key, value, rope_key, positions >= 0, scale)
