"""Entry point of select_blocks."""

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import arguments, blocks, dispatch
from pallas_kernels.masked_attention import RESIDUAL_NAMES
from pallas_kernels.select_blocks import mosaic_gpu, reference


def select_blocks(
    query: jax.Array,  # [B, T, N, H]
    key: jax.Array,  # [B, C, K, H]
    lse: jax.Array,  # [B, T, N]
    *,
    num_selected_blocks: int,
    block_size: int,
    compression_block_size: int,
    compression_stride: int,
    queries_per_selection: int,
    segment_ids: jax.Array | None = None,  # [B, S]
    query_offset: jax.Array | int | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:  # [B, M, K, L]
    """Chooses, for each group of queries and each key head, the most important blocks of tokens.

    The importance of a block is the compressed attention that the first query of the group pays to
    it, summed over the query heads of the key head (NSA, arXiv 2502.11089; see
    `reference.block_importance`). The first block of the document, the block of the query and the
    one before it are always chosen and count inside L; a list too short for the three keeps the
    nearest. Equal importance goes to the lower index. No gradient flows through the choice.

    Args:
      query: [B, T, N, H], as given to compressed_attention.
      key: [B, C, K, H], the compressed keys.
      lse: [B, T, N], as compressed_attention returned it.
      num_selected_blocks: L.
      block_size: Tokens of a block to select.
      compression_block_size: Tokens of a compressed block.
      compression_stride: Tokens between the starts of neighbouring compressed blocks.
      queries_per_selection: Consecutive queries that share a list; divides block_size, so that all
        of them lie in one block.
      segment_ids: int32 [B, S], document of each token, 0 = padding; None = one document a row.
        Documents start at multiples of block_size.
      query_offset: int32 [], traced or not, a multiple of block_size: the queries are tokens
        query_offset .. query_offset + T - 1 of a row of S tokens. None = they are the whole row,
        S = T.
      scale: Factor of the scores; None = 1 / sqrt(H).
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
      int32 [B, M, K, L], M = ceil(T / queries_per_selection): block numbers of the row, ascending,
      then -1 where fewer than L blocks exist. A group of padding has -1 only.

    Raises:
      ValueError: An argument has a wrong shape, type or size.
      NotImplementedError: The implementation asked for cannot take the call.
    """
    arguments.check_positive(
        num_selected_blocks=num_selected_blocks,
        block_size=block_size,
        compression_block_size=compression_block_size,
        compression_stride=compression_stride,
        queries_per_selection=queries_per_selection,
    )
    arguments.check_divides_block_size("queries_per_selection", queries_per_selection, block_size)
    arguments.check_divides_block_size("compression_stride", compression_stride, block_size)
    arguments.check_starts_block(query_offset, block_size)
    length = arguments.row_length(query, segment_ids, query_offset)
    num_blocks = blocks.number_of_blocks(length, compression_block_size, compression_stride)
    arguments.check_query_key(query, key, num_blocks)
    arguments.check_shape("lse", lse, query.shape[:3])
    arguments.check_segment_ids(segment_ids, query, length)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, lse = jax.lax.stop_gradient((query, key, lse))
    call = (
        query,
        key,
        lse,
        num_selected_blocks,
        block_size,
        compression_block_size,
        compression_stride,
        queries_per_selection,
        segment_ids,
        scale,
        query_offset,
    )
    lists = dispatch.run(
        "select_blocks",
        implementation,
        mosaic_gpu=lambda: mosaic_gpu.select_blocks(*call),
        xla=lambda: reference.select_blocks(*call),
    )
    return checkpoint_name(lists, RESIDUAL_NAMES[2])
