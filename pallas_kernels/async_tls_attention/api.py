"""Entry point of async_tls_attention."""

import jax

from pallas_kernels import arguments, cache_arguments, dispatch
from pallas_kernels.async_tls_attention import mosaic_gpu, reference


def async_tls_attention(
    query: jax.Array,  # [B, N, H]
    key: jax.Array,  # [B, S, K, R]
    value: jax.Array | None,  # [B, S, K, h]
    positions: jax.Array,  # [B, K, T]
    *,
    rope_key: jax.Array | None = None,  # [B, S, H - R]
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:  # [B, N, h], [B, N]
    """Attends from one token of each row to the tokens on its lists.

    o = sum_s softmax_s(scale * q . [k_s ; r_s]) v_s over the listed s: exact attention to the
    tokens that AsyncTLS chose (arXiv 2604.07815), or any other choice.

    Args:
      query: [B, N, H].
      key: [B, S, K, R]; K divides N, query head n reads key head n // (N // K).
      value: [B, S, K, h], or None: the keys, without rope_key.
      positions: int32 [B, K, T], below S, -1 for none; a token counts as often as it is listed.
      rope_key: [B, S, H - R], the last numbers of the key of every head; None where R = H.
      scale: Factor of the scores; None = 1 / sqrt(H).
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
      Output [B, N, h] in query's dtype; log-sum-exp of the scores [B, N], float32 or better. An
      empty list has output 0 and lse -inf.

    Raises:
      ValueError: An argument has a wrong shape, type or size.
      NotImplementedError: The implementation asked for cannot take the call.
    """
    cache_arguments.check_keys(query, key, value, rope_key)
    if positions.ndim != 3:
        raise ValueError(f"positions: expected [B, K, T], got {list(positions.shape)}")
    shape = (query.shape[0], key.shape[2], positions.shape[2])
    arguments.check_integers("positions", positions, shape)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    call = query, key, value, positions, rope_key, scale
    return dispatch.run(
        "async_tls_attention",
        implementation,
        mosaic_gpu=lambda: mosaic_gpu.async_tls_attention(*call),
        xla=lambda: reference.async_tls_attention(*call),
    )
