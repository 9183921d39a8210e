"""Exact attention of one query a row to a list of tokens."""

import jax

from asa_jax.model.grouped_query_attention import GroupedQueryCache
from asa_jax.model.latent_attention import LatentCache
from pallas_kernels.async_tls_attention import async_tls_attention
from pallas_kernels.dispatch import Implementation


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


def attend_cache(
    query: jax.Array,
    cache: GroupedQueryCache | LatentCache,
    positions: jax.Array,
    scale: float,
    implementation: Implementation | None = None,
) -> jax.Array:
    """As `attend_tokens`, to a cache of a model as it is: of latents, no keys are put together."""
    if isinstance(cache, LatentCache):
        output, _ = async_tls_attention(
            query, cache.latent[:, :, None], None, positions, rope_key=cache.rope_key,
            scale=scale, implementation=implementation,
        )  # fmt: skip
        return output
    return attend_tokens(query, *cache, positions, scale, implementation)
