"""Definition of selected_attention in XLA, in two forms that give the same numbers."""

import jax
import jax.numpy as jnp

from pallas_kernels import blocks, chunking
from pallas_kernels.masked_attention import masked_attention, statistics_dtype

# Time of a score with a gathered key over that of a score that a mask may discard: the gather, its
# small products and the scatter of its gradient are slow. Measured on two CPU cores in float32.
COST_OF_GATHERED_SCORE = 6


def selected_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_indices: jax.Array,
    block_size: int,
    queries_per_selection: int,
    segment_ids: jax.Array | None,
    scale: float,
    query_offset: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.selected_attention`; value is given."""
    num_queries = query.shape[1]
    num_listed = block_indices.shape[3] * block_size
    attend = attend_all if key.shape[1] <= COST_OF_GATHERED_SCORE * num_listed else attend_gathered
    sums = statistics_dtype(query.dtype)  # the gradient adds up over chunks
    arrays = (query, *blocks.query_rows(segment_ids, num_queries, query_offset))
    groups = [chunking.split_axis1(array, queries_per_selection) for array in arrays]
    results = attend(
        (*groups, block_indices), key.astype(sums), value.astype(sums), block_size, scale
    )
    return jax.tree.map(lambda array: chunking.merge_axis1(array, num_queries), results)


def attend_all(
    groups: tuple[jax.Array, ...],
    key: jax.Array,
    value: jax.Array,
    block_size: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Scores every key and masks those not listed: nothing but matrix products.

    Args:
      groups: query [B, M, queries of a group, N, H], their positions and first visible tokens
        [B or 1, M, queries of a group], block_indices [B, M, K, L].
      key: [B, S, K, H].
      value: [B, S, K, h].
      block_size: Tokens of a block.
      scale: Factor of the scores.

    Returns:
      Output [B, M, queries of a group, N, h] and lse [B, M, queries of a group, N].
    """
    batch, _, group_size, num_heads, _ = groups[0].shape
    key_positions = jnp.arange(key.shape[1], dtype=jnp.int32)
    block = jnp.arange(-(-key_positions.size // block_size), dtype=jnp.int32)

    def attend(*groups: jax.Array) -> tuple[jax.Array, jax.Array]:
        *tokens, block_indices = groups
        num_tokens = block_indices.shape[1] * group_size
        query, positions, first = (chunking.merge_axis1(array, num_tokens) for array in tokens)
        listed = (block_indices[..., None] == block).any(3).swapaxes(1, 2)  # [B, K, M, blocks]
        listed = jnp.repeat(jnp.repeat(listed, group_size, axis=2), block_size, axis=3)
        visible = (first[..., None] <= key_positions) & (key_positions <= positions[..., None])
        visible = visible[:, None] & listed[..., : key_positions.size]
        results = masked_attention(query, key, value, visible, scale)
        return jax.tree.map(lambda array: chunking.split_axis1(array, group_size), results)

    chunk_size = chunking.rows_per_chunk(batch * group_size * num_heads * key_positions.size)
    return chunking.map_chunks(attend, groups, chunk_size)


def attend_gathered(
    groups: tuple[jax.Array, ...],
    key: jax.Array,
    value: jax.Array,
    block_size: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Gathers the listed blocks of each group, in time linear in T; arguments as `attend_all`."""
    batch, _, group_size, num_heads, _ = groups[0].shape
    num_kv_heads, num_listed = key.shape[2], groups[-1].shape[3] * block_size
    key, value = (
        chunking.split_axis1(array, block_size).transpose(0, 3, 1, 2, 4) for array in (key, value)
    )

    def gather(array: jax.Array, block_indices: jax.Array) -> jax.Array:
        """[B, K, blocks, block_size, H] at [B, M, K, L] -> [B * M, L * block_size, K, H]."""
        at = block_indices.swapaxes(1, 2).reshape(batch, num_kv_heads, -1, 1, 1)
        taken = jnp.take_along_axis(array, at, axis=2, mode="clip")
        taken = taken.reshape(batch, num_kv_heads, -1, num_listed, array.shape[-1])
        return taken.transpose(0, 2, 3, 1, 4).reshape(-1, num_listed, num_kv_heads, array.shape[-1])

    def attend(
        query: jax.Array, positions: jax.Array, first: jax.Array, block_indices: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        ordered = jnp.sort(block_indices, axis=3)
        listed = jnp.diff(ordered, axis=3, prepend=-1) != 0  # neither none nor a repetition
        key_positions = ordered[..., None] * block_size + jnp.arange(block_size, dtype=jnp.int32)
        visible = listed[..., None] & (key_positions >= 0)
        visible, key_positions = (
            array.reshape(*ordered.shape[:3], 1, num_listed) for array in (visible, key_positions)
        )
        first, positions = (array[:, :, None, :, None] for array in (first, positions))
        visible = visible & (first <= key_positions) & (key_positions <= positions)
        output, lse = masked_attention(
            query.reshape(-1, *query.shape[2:]),
            gather(key, ordered),
            gather(value, ordered),
            visible.reshape(-1, *visible.shape[2:]),
            scale,
        )
        return output.reshape(*query.shape[:4], -1), lse.reshape(query.shape[:4])

    chunk_size = chunking.rows_per_chunk(batch * group_size * num_heads * num_listed)
    return chunking.map_chunks(attend, groups, chunk_size)
