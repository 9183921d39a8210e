"""Entry point of sliding_window_attention."""

import jax

from pallas_kernels import arguments, dispatch
from pallas_kernels.sliding_window_attention import mosaic_gpu, reference


def sliding_window_attention(
    query: jax.Array,  # [B, T, N, H]
    key: jax.Array,  # [B, S, K, H]
    value: jax.Array | None,  # [B, S, K, h]
    *,
    window_size: int,
    value_dim: int | None = None,
    segment_ids: jax.Array | None = None,  # [B, S]
    query_offset: jax.Array | int | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, h], [B, T, N]
    """Attends from each token to the last `window_size` tokens of its document, itself included.

    o_t = sum_{t-w < s <= t} softmax_s(scale * q_t . k_s) v_s (Longformer, arXiv 2004.05150); a
    window of T tokens or more is full causal attention.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H]; K divides N, query head n reads key head n // (N // K).
      value: [B, S, K, h], or None: the first `value_dim` numbers of each key.
      window_size: Tokens a token sees, at least 1.
      value_dim: h, needed where value is None.
      segment_ids: int32 [B, S], document of each token, 0 = padding; None = one document a row.
      query_offset: int32 [], traced or not: the queries are tokens query_offset ..
        query_offset + T - 1 of a row of S tokens. None = they are the whole row, S = T.
      scale: Factor of the scores; None = 1 / sqrt(H).
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
      Output [B, T, N, h] in query's dtype; log-sum-exp of the scores [B, T, N], float32 or better.
      A row that sees no key (padding) has output 0, lse -inf and gradient 0.

    Raises:
      ValueError: An argument has a wrong shape, type or size.
      NotImplementedError: The implementation asked for cannot take the call.
    """
    length = arguments.row_length(query, segment_ids, query_offset)
    arguments.check_query_key(query, key, length)
    arguments.check_value(key, value, value_dim)
    arguments.check_positive(window_size=window_size)
    arguments.check_segment_ids(segment_ids, query, length)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return dispatch.run(
        "sliding_window_attention",
        implementation,
        mosaic_gpu=lambda: mosaic_gpu.sliding_window_attention(
            query, key, value, window_size, value_dim, segment_ids, scale, query_offset
        ),
        xla=lambda: reference.sliding_window_attention(
            query, key, key[..., :value_dim] if value is None else value, window_size,
            segment_ids, scale, query_offset,
        ),
    )  # fmt: skip
