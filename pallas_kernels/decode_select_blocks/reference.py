"""Definition of decode_select_blocks in XLA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.reference import decode_scores
from pallas_kernels.select_blocks.reference import block_importance, choose_blocks


class Sizes(NamedTuple):
    """Tokens of blocks, and tokens that share a list; see `api.decode_select_blocks`."""

    block_size: int
    compression_block_size: int
    compression_stride: int
    queries_per_selection: int

    def importance(self, probabilities: jax.Array, num_blocks: int) -> jax.Array:
        """Importance [..., num_blocks] of blocks from attention [..., G, C]."""
        return block_importance(
            probabilities,
            num_blocks=num_blocks,
            block_size=self.block_size,
            compression_block_size=self.compression_block_size,
            compression_stride=self.compression_stride,
        )

    def num_blocks(self, num_compressed: int) -> int:
        """The blocks of as many tokens as can have so many complete compressed blocks."""
        num_tokens = self.compression_stride * num_compressed + self.compression_block_size - 1
        return -(-num_tokens // self.block_size)

    def starts_list(self, lengths: jax.Array) -> jax.Array:
        """Whether the last of `lengths` tokens is the first of those that share a list."""
        return (lengths > 0) & ((lengths - 1) % self.queries_per_selection == 0)


def decode_select_blocks(
    query: jax.Array,
    key: jax.Array,
    rope_key: jax.Array | None,
    lse: jax.Array,
    block_indices: jax.Array,
    lengths: jax.Array,
    sizes: Sizes,
    scale: float,
) -> jax.Array:
    """See `api.decode_select_blocks`."""
    num_compressed, num_kv_heads = key.shape[1:3]
    rope_key = None if rope_key is None else rope_key[:, :, None]
    scores = decode_scores(query, key, rope_key, scale)
    lse = lse.reshape(lse.shape[0], num_kv_heads, -1, 1)
    ends = sizes.compression_stride * jnp.arange(num_compressed) + sizes.compression_block_size
    complete = (ends <= lengths[:, None])[:, None, None]
    probabilities = jnp.exp(jnp.where(complete, scores - lse, -jnp.inf))
    importance = sizes.importance(probabilities, sizes.num_blocks(num_compressed))
    own = ((lengths - 1) // sizes.block_size)[:, None, None]
    fresh = choose_blocks(importance, own, jnp.zeros_like(own), block_indices.shape[2])
    starts_list = sizes.starts_list(lengths)[:, None, None]
    return jnp.where(starts_list, fresh, block_indices)
