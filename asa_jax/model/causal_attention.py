"""Full causal attention, through `jax.nn.dot_product_attention`, in chunks of queries."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# A [chunk, T] score matrix is the largest that exists.
QUERY_CHUNK = 1024


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    scale: float | None = None,
) -> jax.Array:
    """Causal softmax attention within each document of a row.

    Args:
        query: [B, T, N, H].
        key: [B, T, K, H]; query head n reads key head n // (N // K).
        value: [B, T, K, h] with h <= H.
        segment_ids: int [B, T]; documents of a row, 0 for padding.
        scale: factor on the scores; None: 1 / sqrt(H).

    Returns:
        [B, T, N, h], zero where segment_ids is 0.
    """
    length, value_dim = query.shape[1], value.shape[-1]
    # The library asks for one head size; zero features of the value cost no correctness.
    value = jnp.pad(value, ((0, 0),) * 3 + ((0, key.shape[-1] - value_dim),))

    def attend(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, rows = chunk
        segments = jnp.take(segment_ids, rows, axis=1)
        mask = segments[:, :, None] == segment_ids[:, None, :]
        mask &= rows[:, None] >= jnp.arange(length)
        return jax.nn.dot_product_attention(queries, key, value, mask=mask[:, None], scale=scale)

    if length <= QUERY_CHUNK:
        output = attend((query, jnp.arange(length)))
    else:
        output = _map_query_chunks(attend, query)
    visible = (segment_ids > 0)[..., None, None]
    return jnp.where(visible, output[..., :value_dim], 0)


def _map_query_chunks(
    attend: Callable[[tuple[jax.Array, jax.Array]], jax.Array], query: jax.Array
) -> jax.Array:
    batch, length, *tail = query.shape
    chunks = -(-length // QUERY_CHUNK)
    padded = jnp.pad(query, ((0, 0), (0, chunks * QUERY_CHUNK - length), (0, 0), (0, 0)))
    split = jnp.moveaxis(padded.reshape(batch, chunks, QUERY_CHUNK, *tail), 1, 0)
    rows = jnp.arange(chunks * QUERY_CHUNK).reshape(chunks, QUERY_CHUNK)
    # Scores are computed again in the backward pass instead of being kept.
    output = jax.lax.map(jax.checkpoint(attend), (split, jnp.minimum(rows, length - 1)))
    return jnp.moveaxis(output, 0, 1).reshape(batch, -1, *output.shape[-2:])[:, :length]
