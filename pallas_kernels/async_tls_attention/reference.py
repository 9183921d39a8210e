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
    value_columns: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.async_tls_attention`; gathers the tokens."""
    rows = jnp.arange(positions.shape[0])[:, None, None]
    heads = jnp.arange(positions.shape[1])
    by_token = positions.swapaxes(1, 2)

    def gather(x: jax.Array, *place: jax.Array) -> jax.Array:
        # What stands in the place of no token, may be anything, NaN too.
        return jnp.where(by_token[..., None] >= 0, x[rows, jnp.maximum(by_token, 0), *place], 0)

    listed = gather(key, heads)
    if value_columns is not None:
        value, listed = listed[..., slice(*value_columns)], listed[..., : query.shape[2]]
    elif value is not None:
        value = gather(value, heads)
    rope_key = None if rope_key is None else gather(rope_key)
    return attend_visible(query, listed, value, rope_key, positions >= 0, scale)
