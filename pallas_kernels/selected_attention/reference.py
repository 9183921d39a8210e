"""Definition of selected_attention in XLA.

Every query scores every key and a mask keeps the selected ones: more arithmetic than a gather of the selected
blocks, but all of it, the gradient included, is matrix multiplication.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import blocks, chunking
from pallas_kernels.masked_attention import masked_attention, merge_heads, split_heads


def selected_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_indices: jax.Array,
    block_size: int,
    queries_per_selection: int,
    segment_ids: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.selected_attention`."""
    batch, length, num_heads, _ = query.shape
    num_blocks = -(-length // block_size)

    def groups(array: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, M, queries_per_selection, ...]
        padded = chunking.pad_axis1(array, queries_per_selection)
        return padded.reshape(array.shape[0], -1, queries_per_selection, *array.shape[2:])

    def ungroup(array: jax.Array) -> jax.Array:
        return array.reshape(array.shape[0], -1, *array.shape[3:])

    def attend(query, block_indices, positions, segments):
        positions = ungroup(positions)[..., None]
        key_positions = jnp.arange(length)
        causal = key_positions <= positions
        if segments is not None:
            causal &= blocks.same_document(ungroup(segments)[..., None], segment_ids[:, None])
        listed = (block_indices[..., None] == jnp.arange(num_blocks)).any(-2)  # [B, M, K, blocks]
        listed = jnp.repeat(jnp.repeat(listed, queries_per_selection, 1), block_size, 3)
        visible = listed[..., :length].transpose(0, 2, 1, 3) & causal[:, None]
        query = split_heads(ungroup(query), key.shape[2])
        output, lse = masked_attention(query, key, value, visible[:, :, :, None], scale)
        num_groups = block_indices.shape[1]
        regroup = lambda array: array.reshape(
            batch, num_groups, queries_per_selection, num_heads, *array.shape[4:]
        )
        return regroup(output), regroup(lse)

    arrays = (
        groups(query),
        block_indices,
        groups(blocks.token_positions(length)),
        None if segment_ids is None else groups(segment_ids),
    )
    scores_per_group = batch * num_heads * queries_per_selection * length
    chunk_size = chunking.rows_per_chunk(scores_per_group)
    output, lse = chunking.map_chunks(attend, arrays, chunk_size)
    return ungroup(output)[:, :length], ungroup(lse)[:, :length]
