"""Entry point of decode_select_blocks."""

import jax

from pallas_kernels import arguments, cache_arguments, dispatch
from pallas_kernels.decode_select_blocks import mosaic_gpu, reference
from pallas_kernels.decode_select_blocks.reference import Sizes


def decode_select_blocks(
    query: jax.Array,  # [B, N, H]
    key: jax.Array,  # [B, C, K, R]
    lse: jax.Array,  # [B, N]
    block_indices: jax.Array,  # [B, K, L]
    lengths: jax.Array,  # [B]
    *,
    block_size: int,
    compression_block_size: int,
    compression_stride: int,
    queries_per_selection: int,
    rope_key: jax.Array | None = None,  # [B, C, H - R]
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:  # [B, K, L]
    """Chooses blocks anew in the rows whose token is the first of a group; others keep their list.

    `select_blocks` for the last token of each row: importance of a block is the compressed
    attention of that token to it, summed over the query heads of a key head (NSA, arXiv 2502.11089;
    lists for several queries: ASA, arXiv 2511.00819).

    Args:
      query: [B, N, H], as given to `decode_attention` over the compressed keys.
      key: [B, C, K, R], compressed keys; those of incomplete blocks may hold anything finite.
      lse: [B, N], as `decode_attention` returned it.
      block_indices: int32 [B, K, L], the lists of the token before.
      lengths: int32 [B], tokens of each row in the cache, that of the query included.
      block_size: Tokens of a block to select.
      compression_block_size: Tokens of a compressed block.
      compression_stride: Tokens between the starts of neighbouring compressed blocks.
      queries_per_selection: Consecutive tokens that share a list; divides block_size.
      rope_key: [B, C, H - R], the last numbers of the key of every head; None where R = H.
      scale: Factor of the scores; None = 1 / sqrt(H).
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
      int32 [B, K, L]. A new list has the first block, that of the token, the one before it and the
      most important ones between, ascending, then -1; equal importance goes to the lower index.

    Raises:
      ValueError: An argument has a wrong shape, type or size.
      NotImplementedError: The implementation asked for cannot take the call.
    """
    cache_arguments.check_cache(query, key, None, rope_key, lengths)
    arguments.check_shape("lse", lse, query.shape[:2])
    arguments.check_positive(
        block_size=block_size,
        compression_block_size=compression_block_size,
        compression_stride=compression_stride,
        queries_per_selection=queries_per_selection,
    )
    arguments.check_divides_block_size("queries_per_selection", queries_per_selection, block_size)
    arguments.check_divides_block_size("compression_stride", compression_stride, block_size)
    cache_arguments.check_lists(query, key, block_indices)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    sizes = Sizes(block_size, compression_block_size, compression_stride, queries_per_selection)
    call = query, key, rope_key, lse, block_indices, lengths, sizes, scale
    return dispatch.run(
        "decode_select_blocks",
        implementation,
        mosaic_gpu=lambda: mosaic_gpu.decode_select_blocks(*call),
        xla=lambda: reference.decode_select_blocks(*call),
    )
