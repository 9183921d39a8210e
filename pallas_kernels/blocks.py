"""Arithmetic of blocks of tokens and of documents packed in a row.

A row of `segment_ids` holds documents as contiguous runs of one id > 0; 0 is padding. A document starts at a
multiple of the selection block size, so block numbers of the row serve every document in it.
"""

import jax
import jax.numpy as jnp


def number_of_blocks(num_tokens: int, block_size: int, stride: int) -> int:
    """Number of complete blocks of `block_size` tokens, one every `stride` tokens."""
    return max(0, (num_tokens - block_size) // stride + 1)


def token_positions(num_tokens: int) -> jax.Array:
    """Positions 0 .. num_tokens - 1 of a row, int32 [1, T]."""
    return jnp.arange(num_tokens, dtype=jnp.int32)[None]


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """Position in the row at which the document of each token starts, int32 [B, T]."""
    is_start = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    positions = token_positions(segment_ids.shape[1])
    return jax.lax.cummax(jnp.where(is_start, positions, 0), axis=1)


def same_document(query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """True where query and key (broadcast against each other) are tokens of one document."""
    return (query_segments == key_segments) & (query_segments > 0)


def visible_blocks(
    positions: jax.Array,
    segments: jax.Array | None,
    segment_ids: jax.Array | None,
    num_blocks: int,
    block_size: int,
    stride: int,
) -> jax.Array:
    """Which compressed blocks some tokens see: those complete at the token, inside its document.

    Args:
      positions: [1, T] positions of the tokens in the row.
      segments: [B, T] their documents, None = one document a row.
      segment_ids: [B, tokens of the row] documents of the row, None as above.
      num_blocks: C.
      block_size: Tokens of a compressed block.
      stride: Tokens between the starts of neighbouring blocks.

    Returns:
      bool [B or 1, T, C].
    """
    first = stride * jnp.arange(num_blocks, dtype=jnp.int32)
    last = first + block_size - 1
    visible = last <= positions[..., None]
    if segments is None or segment_ids is None:
        return visible
    first_segments, last_segments = segment_ids[:, first], segment_ids[:, last]
    within_one = same_document(first_segments, last_segments)[:, None]
    return visible & within_one & (segments[..., None] == last_segments[:, None])
