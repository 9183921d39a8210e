"""Definition of async_tls_select_blocks in XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.masked_attention import statistics_dtype
from pallas_kernels.token_lists import MAX_KEPT_BLOCKS, competing_blocks, list_best


def async_tls_select_blocks(
    query: jax.Array, bounds: jax.Array, lengths: jax.Array, num_blocks: int, block_size: int
) -> jax.Array:
    """See `api.async_tls_select_blocks`."""
    scores = block_scores(query, bounds).max(2)
    number = jnp.arange(bounds.shape[2])
    competes, kept = competing_blocks(number, lengths[:, None, None], block_size)
    scores = jnp.where(competes, scores, -jnp.inf)
    return list_best(scores, jnp.broadcast_to(kept, scores.shape), num_blocks, MAX_KEPT_BLOCKS)


def block_scores(query: jax.Array, bounds: jax.Array) -> jax.Array:
    """Bounds [B, K, G, C] in float32 or better of the scores of query heads in each block."""
    signs = signed_query(query, bounds.shape[1])
    sums = statistics_dtype(query.dtype)
    return jnp.einsum("BKGH,BKCH->BKGC", signs, bounds, preferred_element_type=sums)


def signed_query(query: jax.Array, num_kv_heads: int) -> jax.Array:
    """relu([q | -q]) by key head: [B, N, H] to [B, K, G, 2 H]."""
    grouped = query.reshape(query.shape[0], num_kv_heads, -1, query.shape[2])
    return jax.nn.relu(jnp.concatenate([grouped, -grouped], axis=-1))
