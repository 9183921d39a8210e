"""Entry point of decode_attention."""

import jax

from pallas_kernels import cache_arguments, dispatch
from pallas_kernels.decode_attention import mosaic_gpu, reference


def decode_attention(
    query: jax.Array,  # [B, N, H]
    key: jax.Array,  # [B, S, K, R]
    value: jax.Array | None,  # [B, S, K, h]
    lengths: jax.Array,  # [B]
    *,
    rope_key: jax.Array | None = None,  # [B, S, H - R]
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:  # [B, N, h], [B, N]
    """Attends from one token of each row to the first keys of its cache.

    o = sum_s softmax_s(scale * q . [k_s ; r_s]) v_s over s < lengths. The keys that count stand
    first, in any order, so a ring of the last W tokens is a cache of min(tokens, W) keys, and the
    means of blocks are a cache of as many as are complete.

    Latent attention in its absorbed form (DeepSeek-V2, arXiv 2405.04434; grouped latents, arXiv
    2505.21487) has the latents for keys and, value=None, for values too, and one rotated key a
    token that all latents of the token share.

    Args:
      query: [B, N, H].
      key: [B, S, K, R]; K divides N, query head n reads key head n // (N // K).
      value: [B, S, K, h], or None: the keys, without rope_key.
      lengths: int32 [B], keys of each row that count, 0 .. S.
      rope_key: [B, S, H - R], the last numbers of the key of every head; None where R = H.
      scale: Factor of the scores; None = 1 / sqrt(H).
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
      Output [B, N, h] in query's dtype; log-sum-exp of the scores [B, N], float32 or better. A row
      without keys has output 0 and lse -inf.

    Raises:
      ValueError: An argument has a wrong shape, type or size.
      NotImplementedError: The implementation asked for cannot take the call.
    """
    cache_arguments.check_cache(query, key, value, rope_key, lengths)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    call = query, key, value, lengths, rope_key, scale
    return dispatch.run(
        "decode_attention",
        implementation,
        mosaic_gpu=lambda: mosaic_gpu.decode_attention(*call),
        xla=lambda: reference.decode_attention(*call),
    )
