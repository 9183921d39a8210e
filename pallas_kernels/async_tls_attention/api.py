"""Entry point of async_tls_attention."""

from typing import Any

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
    value_columns: tuple[int, int] | None = None,
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
      value_columns: First and behind the last of the numbers of `key` that are the value, where one
        array has both, as a pool of blocks does: the key is its first H numbers, and `value` and
        `rope_key` are None.
      scale: Factor of the scores; None = 1 / sqrt(H).
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
      Output [B, N, h] in query's dtype; log-sum-exp of the scores [B, N], float32 or better. An
      empty list has output 0 and lse -inf.

    Raises:
      ValueError: An argument has a wrong shape, type or size.
      NotImplementedError: The implementation asked for cannot take the call.
    """
    if value_columns is None:
        cache_arguments.check_keys(query, key, value, rope_key)
    else:
        _check_packed(query, key, (value, rope_key), value_columns)
    if positions.ndim != 3:
        raise ValueError(f"positions: expected [B, K, T], got {list(positions.shape)}")
    shape = (query.shape[0], key.shape[2], positions.shape[2])
    arguments.check_integers("positions", positions, shape)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    call = query, key, value, positions, rope_key, scale, value_columns
    return dispatch.run(
        "async_tls_attention",
        implementation,
        mosaic_gpu=lambda: mosaic_gpu.async_tls_attention(*call),
        xla=lambda: reference.async_tls_attention(*call),
    )


def _check_packed(
    query: jax.Array, packed: jax.Array, others: tuple[Any, Any], value_columns: tuple[int, int]
) -> None:
    """Raises ValueError unless keys and values of one array fit a query."""
    if packed.ndim != 4 or query.ndim != 3 or packed.shape[3] < query.shape[2]:
        raise ValueError(
            f"key: {list(packed.shape)} does not hold [B, S, K, H] of query {list(query.shape)}"
        )
    keys = jax.ShapeDtypeStruct((*packed.shape[:3], query.shape[2]), packed.dtype)
    cache_arguments.check_keys(query, keys, None, None)  # type: ignore[arg-type]
    begin, end = value_columns
    if not 0 <= begin < end <= packed.shape[3] or any(x is not None for x in others):
        raise ValueError(
            f"value_columns: {value_columns} are not numbers of key [.., {packed.shape[3]}] alone"
        )
