"""Entry point of async_tls_select_blocks."""

import jax

from pallas_kernels import arguments, dispatch
from pallas_kernels.async_tls_select_blocks import mosaic_gpu, reference


def async_tls_select_blocks(
    query: jax.Array,  # [B, N, H]
    bounds: jax.Array,  # [B, K, C, 2 H]
    lengths: jax.Array,  # [B]
    *,
    num_blocks: int,
    block_size: int,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:  # [B, K, num_blocks + 3]
    """Chooses the blocks whose bounds are greatest for some query head of a key head.

    Level 1 of AsyncTLS (arXiv 2604.07815): max_g u(q_g, b) with Quest's bound (arXiv 2406.10774)
    u(q, b) = sum_c max(q_c M_bc, q_c m_bc) as one matrix product, relu([q | -q]) . [M_b | -m_b].

    Args:
      query: [B, N, H]; query head n reads key head n // (N // K).
      bounds: [B, K, C, 2 H], of each block the channel-wise maxima of [k | -k] over its keys;
        finite where no token is.
      lengths: int32 [B], tokens of each row, the tail's included.
      num_blocks: Blocks chosen besides those that are always kept.
      block_size: Tokens of a block.
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
      int32 [B, K, num_blocks + 3]: the first block, the tail, the one before it and the best of the
      others, ascending, then -1; equal bounds go to the lower index.

    Raises:
      ValueError: An argument has a wrong shape, type or size.
      NotImplementedError: The implementation asked for cannot take the call.
    """
    if query.ndim != 3:
        raise ValueError(f"query: expected [B, N, H], got shape {list(query.shape)}")
    if bounds.ndim != 4:
        raise ValueError(f"bounds: expected [B, K, C, 2 H], got shape {list(bounds.shape)}")
    batch, num_heads, head_dim = query.shape
    num_kv_heads = bounds.shape[1]
    arguments.check_shape("bounds", bounds, (batch, *bounds.shape[1:3], 2 * head_dim))
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"bounds: its {num_kv_heads} heads do not divide the {num_heads} of query")
    arguments.check_integers("lengths", lengths, (batch,))
    arguments.check_positive(num_blocks=num_blocks, block_size=block_size)
    call = query, bounds, lengths, num_blocks, block_size
    return dispatch.run(
        "async_tls_select_blocks",
        implementation,
        mosaic_gpu=lambda: mosaic_gpu.async_tls_select_blocks(*call),
        xla=lambda: reference.async_tls_select_blocks(*call),
    )
