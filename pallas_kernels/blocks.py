"""Arithmetic of blocks of tokens and of documents packed in a row.

A row of `segment_ids` [B, T] holds documents as contiguous runs of one id > 0; 0 is padding. A
document starts at a multiple of the selection block size, so the block numbers of the row serve
every document in it. Being contiguous, what a token may see of its document is the range from the
document's start to the token.
"""

import jax
import jax.numpy as jnp


def number_of_blocks(num_tokens: int, block_size: int, stride: int) -> int:
    """Returns how many complete blocks of `block_size` tokens there are, one every `stride`."""
    return max(0, (num_tokens - block_size) // stride + 1)


def token_positions(num_tokens: int) -> jax.Array:
    """Returns positions 0 .. num_tokens - 1 of a row, int32 [1, T]."""
    return jnp.arange(num_tokens, dtype=jnp.int32)[None]


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """Returns the position in the row at which the document of each token starts, int32 [B, T]."""
    is_start = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    positions = token_positions(segment_ids.shape[1])
    return jax.lax.cummax(jnp.where(is_start, positions, 0), axis=1)


def visible_from(segment_ids: jax.Array | None, num_tokens: int) -> jax.Array:
    """Returns the first position that each token may see, T for padding, which sees nothing.

    Args:
      segment_ids: int [B, T], or None for one document a row.
      num_tokens: T.

    Returns:
      int32 [B, T], or [1, T] for segment_ids None.
    """
    if segment_ids is None:
        return jnp.zeros((1, num_tokens), jnp.int32)
    return jnp.where(segment_ids > 0, document_starts(segment_ids), num_tokens)


def of_queries(row: jax.Array, num_queries: int, query_offset: jax.Array | int | None) -> jax.Array:
    """Returns what of a row [B, S] is of its T queries: [B, T]; None: they are the row."""
    if query_offset is None:
        return row
    return jax.lax.dynamic_slice_in_dim(row, query_offset, num_queries, axis=1)


def query_rows(
    segment_ids: jax.Array | None, num_queries: int, query_offset: jax.Array | int | None
) -> tuple[jax.Array, jax.Array]:
    """Returns where queries stand in the row of their keys, and from where on they see it.

    Args:
      segment_ids: int [B, S] of the row, or None for one document a row.
      num_queries: T.
      query_offset: int32 [], position in the row of the first query; None = they are the row.

    Returns:
      Positions int32 [1, T], and what `visible_from` says of them, int32 [B or 1, T].
    """
    positions = token_positions(num_queries)
    if query_offset is None:
        return positions, visible_from(segment_ids, num_queries)
    positions += query_offset
    if segment_ids is None:
        return positions, jnp.zeros_like(positions)
    first_visible = visible_from(segment_ids, segment_ids.shape[1])
    return positions, of_queries(first_visible, num_queries, query_offset)


def complete_blocks(
    positions: jax.Array, first_visible: jax.Array, num_blocks: int, block_size: int, stride: int
) -> jax.Array:
    """Returns which compressed blocks are complete at some tokens and lie in their document.

    Args:
      positions: [1, T] positions of the tokens in the row.
      first_visible: [B or 1, T] of them, see `visible_from`.
      num_blocks: C.
      block_size: Tokens of a compressed block.
      stride: Tokens between the starts of neighbouring blocks.

    Returns:
      bool [B or 1, T, C].
    """
    first = stride * jnp.arange(num_blocks, dtype=jnp.int32)
    last = first + block_size - 1
    return (first_visible[..., None] <= first) & (last <= positions[..., None])
