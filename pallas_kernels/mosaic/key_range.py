"""Attention to a contiguous range of keys per token: its arithmetic, for kernels and their callers.

Key j stands for the tokens stride * j .. stride * j + block_size - 1. A token t sees it if it is
complete, stride * j + block_size - 1 <= t, and starts in t's document and in the window before t,
stride * j >= max(start, t - window + 1). Both ends of the range grow with t, so that a tile of
tokens sees one range of tiles of keys, the inner ones of which need no mask; and the other way
round. Sliding windows have blocks of one token; compressed blocks have no window.
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
      start: [B, T] first token that a token may see, T for padding.
      earliest_start: [B, T / 64] least of them in a tile of tokens.
      latest_start: [B, T / 64] greatest.
      first_end: [B, S / 64] end of the document in which the first key of a tile starts.
      last_end: [B, S / 64] of the last one.
    """

    start: jax.Array
    earliest_start: jax.Array
    latest_start: jax.Array
    first_end: jax.Array
    last_end: jax.Array


def documents(segment_ids: jax.Array, num_keys: int, stride: int) -> Documents:
    """Returns the bounds of the documents of a row.

    Args:
      segment_ids: int [B, T], T a multiple of 64.
      num_keys: S, a multiple of 64.
      stride: Tokens between neighbouring keys.
    """
    batch, length = segment_ids.shape
    start = blocks.visible_from(segment_ids, length)
    tiles = start.reshape(batch, length // TILE, TILE)
    end = length - blocks.document_starts(segment_ids[:, ::-1])[:, ::-1]
    first_keys = jnp.arange(0, num_keys, TILE, dtype=jnp.int32)
    ends = (
        end[:, jnp.minimum(stride * keys, length - 1)]
        for keys in (first_keys, first_keys + TILE - 1)
    )
    return Documents(start, tiles.min(-1), tiles.max(-1), *ends)
