"""Entry point of selected_attention."""

import jax

from pallas_kernels import arguments, dispatch
from pallas_kernels.selected_attention import mosaic_gpu, reference


def selected_attention(
    query: jax.Array,  # [B, T, N, H]
    key: jax.Array,  # [B, S, K, H]
    value: jax.Array | None,  # [B, S, K, h]
    block_indices: jax.Array,  # [B, M, K, L]
    *,
    block_size: int,
    queries_per_selection: int,
    value_dim: int | None = None,
    segment_ids: jax.Array | None = None,  # [B, S]
    query_offset: jax.Array | int | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:  # [B, T, N, h], [B, T, N]
    """Attends from each token to the tokens, up to itself, of the blocks on its group's list.

    o_t = sum_s softmax_s(scale * q_t . k_s) v_s over the s <= t of t's document whose block
    s // block_size is on the list of group t // queries_per_selection (NSA, arXiv 2502.11089;
    queries that share a list: ASA, arXiv 2511.00819).

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H]; K divides N, query head n reads key head n // (N // K).
      value: [B, S, K, h], or None: the first `value_dim` numbers of each key.
      block_indices: int32 [B, M, K, L], M = ceil(T / queries_per_selection); block numbers of the
        row in any order, -1 = none; a block listed twice counts once.
      block_size: Tokens of a block.
      queries_per_selection: Consecutive queries that share a list; divides block_size.
      value_dim: h, needed where value is None.
      segment_ids: int32 [B, S], document of each token, 0 = padding; None = one document a row.
      query_offset: int32 [], traced or not, a multiple of block_size: the queries are tokens
        query_offset .. query_offset + T - 1 of a row of S tokens. None = they are the whole row,
        S = T.
      scale: Factor of the scores; None = 1 / sqrt(H).
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
      Output [B, T, N, h] in query's dtype; log-sum-exp of the scores [B, T, N], float32 or better.
      A row that sees no key (padding, an empty list) has output 0, lse -inf and gradient 0.

    Raises:
      ValueError: An argument has a wrong shape, type or size.
      NotImplementedError: The implementation asked for cannot take the call.
    """
    length = arguments.row_length(query, segment_ids, query_offset)
    arguments.check_query_key(query, key, length)
    arguments.check_value(key, value, value_dim)
    arguments.check_positive(block_size=block_size, queries_per_selection=queries_per_selection)
    arguments.check_divides_block_size("queries_per_selection", queries_per_selection, block_size)
    arguments.check_starts_block(query_offset, block_size)
    if block_indices.ndim != 4:
        raise ValueError(f"block_indices: expected [B, M, K, L], got {list(block_indices.shape)}")
    num_groups = -(-query.shape[1] // queries_per_selection)
    list_shape = (query.shape[0], num_groups, key.shape[2], block_indices.shape[3])
    arguments.check_integers("block_indices", block_indices, list_shape)
    arguments.check_segment_ids(segment_ids, query, length)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return dispatch.run(
        "selected_attention",
        implementation,
        mosaic_gpu=lambda: mosaic_gpu.selected_attention(
            query, key, value, block_indices, block_size, queries_per_selection,
            value_dim, segment_ids, scale, query_offset,
        ),
        xla=lambda: reference.selected_attention(
            query, key, key[..., :value_dim] if value is None else value, block_indices,
            block_size, queries_per_selection, segment_ids, scale, query_offset,
        ),
    )  # fmt: skip
