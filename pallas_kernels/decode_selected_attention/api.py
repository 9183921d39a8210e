"""Entry point of decode_selected_attention."""

import jax

from pallas_kernels import arguments, cache_arguments, dispatch
from pallas_kernels.decode_selected_attention import mosaic_gpu, reference


def decode_selected_attention(
    query: jax.Array,  # [B, N, H]
    key: jax.Array,  # [B, S, K, R]
    value: jax.Array | None,  # [B, S, K, h]
    block_indices: jax.Array,  # [B, K, L]
    lengths: jax.Array,  # [B]
    *,
    block_size: int,
    rope_key: jax.Array | None = None,  # [B, S, H - R]
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:  # [B, N, h], [B, N]
    """Attends from one token of each row to the tokens of the blocks on its lists.

    `selected_attention` for the last token of each row (NSA, arXiv 2502.11089; latents and shared
    lists: ASA, arXiv 2511.00819): o = sum_s softmax_s(scale * q . [k_s ; r_s]) v_s over the
    s < lengths whose block s // block_size is listed.

    Args:
      query: [B, N, H].
      key: [B, S, K, R]; K divides N, query head n reads key head n // (N // K).
      value: [B, S, K, h], or None: the keys, without rope_key.
      block_indices: int32 [B, K, L], as `decode_select_blocks` gives them: ascending, then -1; a
        block listed twice counts once.
      lengths: int32 [B], tokens of each row in the cache, that of the query included.
      block_size: Tokens of a block.
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
    cache_arguments.check_cache(query, key, value, rope_key, lengths)
    arguments.check_positive(block_size=block_size)
    cache_arguments.check_lists(query, key, block_indices)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    call = query, key, value, block_indices, lengths, block_size, rope_key, scale
    return dispatch.run(
        "decode_selected_attention",
        implementation,
        mosaic_gpu=lambda: mosaic_gpu.decode_selected_attention(*call),
        xla=lambda: reference.decode_selected_attention(*call),
    )
