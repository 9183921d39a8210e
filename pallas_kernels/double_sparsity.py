"""Double Sparsity's choice of tokens (arXiv 2408.07092), which AsyncTLS is compared with.

Labels of all tokens are read, as level 2 of AsyncTLS does with a list of every block. Scores of so
many do not fit into the registers of a program: the kernel lists the best of each of some ranges,
and then the best of these, which is exact and no sort.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.async_tls_select_tokens import mosaic_gpu, reference
from pallas_kernels.async_tls_select_tokens.reference import Labels
from pallas_kernels.mosaic.largest_columns import COLUMNS, MAX_COLUMNS, NEVER, largest_columns
from pallas_kernels.token_lists import MAX_KEPT_BLOCKS


def best_tokens(
    query: jax.Array,
    labels: Labels,
    lengths: jax.Array,
    token_budget: int,
    block_size: int,
    scale: float,
    *,
    sorts: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """Lists the tokens to which labels give the greatest weights, and those that are kept.

    Arguments and result are those of `async_tls_select_tokens`, for a list of all blocks.

    Args:
      query: [B, N, r].
      labels: Over [B, K, S].
      lengths: int32 [B].
      token_budget: Tokens chosen besides those that are kept.
      block_size: Tokens of a block.
      scale: Factor of the scores.
      sorts: Whether the kernel's scores are listed by `lax.top_k`.
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
      Positions int32 [B, K, token_budget + 3 block_size], -1 for none; sorted, the best first.
    """
    batch, num_kv_heads, num_tokens = labels.step.shape
    every = jnp.arange(num_tokens // block_size, dtype=jnp.int32)
    blocks = jnp.broadcast_to(every, (batch, num_kv_heads, every.size))
    call = query, labels, blocks, lengths

    def by_kernel() -> jax.Array:
        mosaic_gpu.check_supported(*call[:3], block_size, num_tokens)
        weights = mosaic_gpu.token_weights(*call, scale)
        kept = MAX_KEPT_BLOCKS * block_size
        if sorts:
            best, positions = jax.lax.top_k(weights[..., :num_tokens], token_budget + kept)
            return jnp.where(best >= 0, positions, -1)
        return best_of_ranges(weights, num_tokens, token_budget, kept)

    return dispatch.run(
        "double_sparsity",
        implementation,
        mosaic_gpu=by_kernel,
        xla=lambda: reference.async_tls_select_tokens(*call, token_budget, block_size, scale),
    )


@functools.partial(jax.jit, static_argnames=("num_columns", "size", "max_kept", "interpret"))
def best_of_ranges(
    weights: jax.Array, num_columns: int, size: int, max_kept: int, *, interpret: Any = None
) -> jax.Array:
    """Lists columns as `largest_columns` does, of rows that are longer than it takes.

    Args:
      weights: float32 [B, K, C].
      num_columns: Columns that there are.
      size: Places on the list besides those that are kept.
      max_kept: The most columns that are kept.
      interpret: Parameters of interpret mode, for tests.

    Returns:
      int32 [B, K, size + max_kept], ascending, then -1.

    Raises:
      NotImplementedError: The columns cannot be cut in such ranges.
    """
    batch, num_kv_heads, _ = weights.shape
    count = -(-num_columns // MAX_COLUMNS)
    length = num_columns // count
    if num_columns % (count * COLUMNS) or count * (size + max_kept) > MAX_COLUMNS:
        raise NotImplementedError(f"labels: {num_columns} tokens cannot be cut in {count} ranges")
    ranges = weights[..., :num_columns].reshape(batch, num_kv_heads * count, length)
    listed = largest_columns(
        ranges, None, num_columns=length, size=size, max_kept=max_kept, interpret=interpret
    )
    best = jnp.take_along_axis(ranges, jnp.maximum(listed, 0), axis=2)
    best = jnp.where(listed >= 0, best, NEVER).reshape(batch, num_kv_heads, -1)
    first = length * (jnp.arange(num_kv_heads * count, dtype=jnp.int32) % count)
    positions = (listed + first[:, None]).reshape(best.shape)
    padded = jnp.pad(best, ((0, 0), (0, 0), (0, -best.shape[2] % COLUMNS)))
    return largest_columns(
        padded, positions, num_columns=best.shape[2], size=size, max_kept=max_kept,
        interpret=interpret,
    )  # fmt: skip
