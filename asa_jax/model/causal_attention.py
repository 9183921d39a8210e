"""Full causal attention: the kernel of a window as long as the row, or XLA in chunks of queries."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.sliding_window_attention import sliding_window_attention

# A [chunk, T] score matrix is the largest that exists.
QUERY_CHUNK = 1024


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    scale: float | None = None,
    query_offset: jax.Array | int | None = None,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """Causal softmax attention within each document of a row.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H]; query head n reads key head n // (N // K).
        value: [B, S, K, h] with h <= H.
        segment_ids: int [B, S]; documents of a row, 0 for padding.
        scale: factor on the scores; None: 1 / sqrt(H).
        query_offset: position in the row of the first query, at most S - T; None: 0.
        implementation: as the operations of `pallas_kernels` take it.

    Returns:
        [B, T, N, h], zero where segment_ids is 0.
    """

    def kernel() -> jax.Array:
        output, _ = sliding_window_attention(
            query, key, value, window_size=key.shape[1], segment_ids=segment_ids,
            query_offset=query_offset, scale=scale, implementation="mosaic_gpu",
        )  # fmt: skip
        return output

    return dispatch.run(
        "causal_attention",
        implementation,
        mosaic_gpu=kernel,
        xla=lambda: _in_query_chunks(
            query, key, value, segment_ids, scale, 0 if query_offset is None else query_offset
        ),
    )


def _in_query_chunks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    scale: float | None,
    query_offset: jax.Array | int,
) -> jax.Array:
    length, value_dim = query.shape[1], value.shape[-1]
    segments = jax.lax.dynamic_slice_in_dim(segment_ids, query_offset, length, axis=1)
    # The library asks for one head size; zero features of the value cost no correctness.
    value = jnp.pad(value, ((0, 0),) * 3 + ((0, key.shape[-1] - value_dim),))

    def attend(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, rows = chunk
        mask = jnp.take(segments, rows, axis=1)[:, :, None] == segment_ids[:, None, :]
        mask &= (query_offset + rows)[:, None] >= jnp.arange(key.shape[1])
        return jax.nn.dot_product_attention(queries, key, value, mask=mask[:, None], scale=scale)

    if length <= QUERY_CHUNK:
        output = attend((query, jnp.arange(length)))
    else:
        output = _map_query_chunks(attend, query)
    visible = (segments > 0)[..., None, None]
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
