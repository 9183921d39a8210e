"""Lists of the best blocks or tokens beside those that are kept in any case, as AsyncTLS has them.

The first block of a row, the tail, which is being filled, and the block before it are always kept.
"""

import jax
import jax.numpy as jnp

MAX_KEPT_BLOCKS = 3


def competing_blocks(
    blocks: jax.Array, lengths: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array]:
    """Which blocks compete for places, and which are kept; no others have tokens.

    Args:
      blocks: int32, numbers of blocks, -1 for none.
      lengths: int32, at least 0, tokens of the rows that they are of.
      block_size: Tokens of a block.

    Returns:
      Two bool arrays.
    """
    # Division by truncation, which kernels have too; so no row may count as -1 tokens.
    tail = jax.lax.div(lengths + (block_size - 1), jnp.int32(block_size)) - 1
    kept = ((blocks == 0) | (blocks >= tail - 1)) & (blocks >= 0) & (blocks <= tail)
    return (blocks > 0) & (blocks < tail - 1), kept


def list_best(scores: jax.Array, kept: jax.Array, size: int, max_kept: int) -> jax.Array:
    """Lists the columns that are kept and the `size` best others.

    Args:
      scores: [..., C], -inf where a column does not compete.
      kept: bool [..., C], at most `max_kept` of them True, where scores are -inf.
      size: Places besides those that are kept.
      max_kept: The most columns that are kept.

    Returns:
      int32 [..., size + max_kept], ascending, then -1; equal scores go to the lower index.
    """
    num_columns = scores.shape[-1]
    best, column = jax.lax.top_k(scores, min(size, num_columns))
    column = jnp.where(best > -jnp.inf, column, num_columns)
    always = jnp.sort(jnp.where(kept, jnp.arange(num_columns), num_columns), axis=-1)
    listed = jnp.sort(jnp.concatenate([column, always[..., :max_kept]], axis=-1), axis=-1)
    padding = [(0, 0)] * (listed.ndim - 1) + [(0, size + max_kept - listed.shape[-1])]
    listed = jnp.where(listed < num_columns, listed, -1)
    return jnp.pad(listed, padding, constant_values=-1).astype(jnp.int32)
