"""Attention to a contiguous range of keys per token: its arithmetic, for kernels and their callers.

Key j stands for the tokens stride * j .. stride * j + block_size - 1. A token t sees it if it is
complete, stride * j + block_size - 1 <= t, and starts in t's document and in the window before t,
stride * j >= max(start, t - window + 1). Both ends of the range grow with t, so that a tile of
tokens sees one range of tiles of keys, the inner ones of which need no mask; and the other way
round. Sliding windows have blocks of one token; compressed blocks have no window.

Tokens and keys are counted along the row of the keys. Queries may be a part of it, and are then
counted from the first one: `position` and `query_at` take one to the other.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import blocks

NO_WINDOW = 2**30  # tokens; beyond every row, and twice it still an int32
TILE = 64  # tokens or keys for which `Documents` holds bounds


@dataclasses.dataclass(frozen=True)
class KeyRange:
    """The keys that a token sees; the numbers are int32 scalars or vectors in registers.

    Attributes:
      block_size: Tokens that a key stands for.
      stride: Tokens between neighbouring keys.
      window: Tokens back to which a key may start, the token itself included.
    """

    block_size: int = 1
    stride: int = 1
    window: int = NO_WINDOW

    def first_key(self, token: Any, start: Any) -> Any:
        """Returns the first key that a token sees, if its document starts at `start`."""
        first_token = jnp.maximum(start, token - (self.window - 1))
        return self.end_of_division(jnp.maximum(first_token, 0))

    def end_of_division(self, token: Any) -> Any:
        """Returns the first key that starts at a token >= 0 or behind it."""
        return lax.div(token + (self.stride - 1), jnp.int32(self.stride))

    def end_key(self, token: Any) -> Any:
        """Returns one more than the last key that a token sees."""
        complete = jnp.maximum(token + (1 + self.stride - self.block_size), 0)
        return lax.div(complete, jnp.int32(self.stride))

    def first_token(self, key: Any) -> Any:
        """Returns the first token that sees a key."""
        return self.stride * key + (self.block_size - 1)

    def end_token(self, key: Any, document_end: Any) -> Any:
        """Returns one more than the last token that sees a key of the document that ends there."""
        return jnp.minimum(document_end, self.stride * key + self.window)


class Documents(NamedTuple):
    """Bounds of packed documents, int32.

    Attributes:
      start: [B, T] first token that a query may see, the length of the row for padding.
      earliest_start: [B, T / 64] least of them in a tile of queries.
      latest_start: [B, T / 64] greatest.
      first_end: [B, S / 64] end of the document in which the first key of a tile starts.
      last_end: [B, S / 64] of the last one.
      query_offset: [1] position in the row of the first query, None = they are the whole row.
    """

    start: jax.Array
    earliest_start: jax.Array
    latest_start: jax.Array
    first_end: jax.Array
    last_end: jax.Array
    query_offset: jax.Array | None


def documents(
    segment_ids: jax.Array,
    num_queries: int,
    num_keys: int,
    stride: int,
    query_offset: jax.Array | int | None,
) -> Documents:
    """Returns the bounds of the documents of a row.

    Args:
      segment_ids: int of all tokens of the row, padded so that every query is one of them.
      num_queries: T, a multiple of 64.
      num_keys: S, a multiple of 64.
      stride: Tokens between neighbouring keys.
      query_offset: int32 [], position in the row of the first query; None = they are the row.
    """
    batch, length = segment_ids.shape
    _, start = blocks.query_rows(segment_ids, num_queries, query_offset)
    tiles = start.reshape(batch, num_queries // TILE, TILE)
    end = length - blocks.document_starts(segment_ids[:, ::-1])[:, ::-1]
    first_keys = jnp.arange(0, num_keys, TILE, dtype=jnp.int32)
    first_end, last_end = (
        end[:, jnp.minimum(stride * keys, length - 1)]
        for keys in (first_keys, first_keys + TILE - 1)
    )
    offset = None if query_offset is None else jnp.asarray(query_offset, jnp.int32)[None]
    return Documents(start, tiles.min(-1), tiles.max(-1), first_end, last_end, offset)


def position(documents: Documents | None, query: Any) -> Any:
    """Returns the position in the row of a query, in a kernel that has references to documents."""
    if documents is None or documents.query_offset is None:
        return query
    return documents.query_offset[0] + query


def query_at(documents: Documents | None, token: Any) -> Any:
    """Returns the query at a position in the row, the first one for a position before it."""
    if documents is None or documents.query_offset is None:
        return token
    return jnp.maximum(token - documents.query_offset[0], 0)
