"""Entry point of compressed_attention."""

import jax

from pallas_kernels import arguments, blocks, dispatch
from pallas_kernels.compressed_attention import mosaic_gpu, reference


def compressed_attention(
    query: jax.Array,  # [B, T, N, H]
    key: jax.Array,  # [B, C, K, H]
    value: jax.Array | None,  # [B, C, K, h]
    *,
    block_size: int,
    stride: int,
    value_dim: int | None = None,
    segment_ids: jax.Array | None = None,  # [B, S]
    query_offset: jax.Array | int | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, h], [B, T, N]
    """Attends from each token to the compressed blocks that are complete at it.

    Compressed block j stands for tokens stride * j .. stride * j + block_size - 1. Token t sees it
    when its last token is at t or before and the block lies in the document of t:
    o_t = sum_j softmax_j(scale * q_t . k_j) v_j (NSA, arXiv 2502.11089).

    Args:
      query: [B, T, N, H].
      key: [B, C, K, H], C = blocks.number_of_blocks(S, block_size, stride), K divides N.
      value: [B, C, K, h], or None: the first `value_dim` numbers of each key.
      block_size: Tokens of a compressed block.
      stride: Tokens between the starts of neighbouring blocks.
      value_dim: h, needed where value is None.
      segment_ids: int32 [B, S], document of each token, 0 = padding; None = one document a row.
      query_offset: int32 [], traced or not: the queries are tokens query_offset ..
        query_offset + T - 1 of a row of S tokens. None = they are the whole row, S = T.
      scale: Factor of the scores; None = 1 / sqrt(H).
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
      Output [B, T, N, h] in query's dtype; log-sum-exp of the scores [B, T, N], float32 or better.
      A row that sees no block (the first block_size - 1 tokens of a document, padding) has output
      0, lse -inf and gradient 0.

    Raises:
      ValueError: An argument has a wrong shape, type or size.
      NotImplementedError: The implementation asked for cannot take the call.
    """
    arguments.check_positive(block_size=block_size, stride=stride)
    length = arguments.row_length(query, segment_ids, query_offset)
    num_blocks = blocks.number_of_blocks(length, block_size, stride)
    arguments.check_query_key(query, key, num_blocks)
    arguments.check_value(key, value, value_dim)
    arguments.check_segment_ids(segment_ids, query, length)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return dispatch.run(
        "compressed_attention",
        implementation,
        mosaic_gpu=lambda: mosaic_gpu.compressed_attention(
            query, key, value, block_size, stride, value_dim, segment_ids, scale, query_offset
        ),
        xla=lambda: reference.compressed_attention(
            query, key, key[..., :value_dim] if value is None else value, block_size, stride,
            segment_ids, scale, query_offset,
        ),
    )  # fmt: skip
