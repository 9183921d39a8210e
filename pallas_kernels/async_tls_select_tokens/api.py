"""Entry point of async_tls_select_tokens."""

import jax
import jax.numpy as jnp

from pallas_kernels import arguments, dispatch
from pallas_kernels.async_tls_select_tokens import mosaic_gpu, reference
from pallas_kernels.async_tls_select_tokens.reference import Labels


def async_tls_select_tokens(
    query: jax.Array,  # [B, N, r]
    labels: Labels,  # over [B, K, S]
    block_indices: jax.Array,  # [B, K, L]
    lengths: jax.Array,  # [B]
    *,
    token_budget: int,
    block_size: int,
    scale: float,
    places: jax.Array | None = None,  # [B, K, L]
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:  # [B, K, token_budget + 3 block_size]
    """Chooses the tokens of listed blocks to which labels give the greatest weights.

    Level 2 of AsyncTLS (arXiv 2604.07815), with labels as Double Sparsity (arXiv 2408.07092) has
    them: a(q, s) = sum_c q_c (zero_s + step_s code_sc) over the r channels of a label, and of the
    tokens that compete those of the greatest sum_g softmax_s(scale a(q_g, s)) over the query heads
    of a key head. Tokens of the first block, the tail and the one before it do not compete: where
    listed they are kept, outside the budget.

    Args:
      query: [B, N, r], the channels of labels; query head n reads key head n // (N // K).
      labels: codes uint8 [B, K, S, r / 2], channel j in the low half of byte j, j + r / 2 in the
        high one; step and zero float16 [B, K, S].
      block_indices: int32 [B, K, L], -1 for none, no block twice.
      lengths: int32 [B], tokens of each row.
      token_budget: Tokens chosen besides those that are kept.
      block_size: Tokens of a block.
      scale: Factor of the scores.
      places: int32 [B, K, L], what the result has in the place of the listed blocks, as the slots
        of a pool that holds them; None for the blocks themselves.
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
      Positions int32 [B, K, token_budget + 3 block_size], or what stands at these offsets of
      `places`, in the order of the lists, then -1; equal weights go to what comes first.

    Raises:
      ValueError: An argument has a wrong shape, type or size.
      NotImplementedError: The implementation asked for cannot take the call.
    """
    _check(query, labels, block_indices, lengths)
    arguments.check_positive(token_budget=token_budget, block_size=block_size)
    if places is not None:
        arguments.check_integers("places", places, block_indices.shape)
    call = query, labels, block_indices, lengths, token_budget, block_size, scale, places
    return dispatch.run(
        "async_tls_select_tokens",
        implementation,
        mosaic_gpu=lambda: mosaic_gpu.async_tls_select_tokens(*call),
        xla=lambda: reference.async_tls_select_tokens(*call),
    )


def _check(query: jax.Array, labels: Labels, block_indices: jax.Array, lengths: jax.Array) -> None:
    """Raises ValueError, naming the argument, for what does not fit together."""
    if query.ndim != 3:
        raise ValueError(f"query: expected [B, N, r], got shape {list(query.shape)}")
    if labels.codes.ndim != 4 or labels.codes.dtype != jnp.uint8:
        raise ValueError(
            f"labels.codes: expected uint8 [B, K, S, r / 2], got {labels.codes.dtype} "
            f"{list(labels.codes.shape)}"
        )
    batch, num_heads, num_channels = query.shape
    num_kv_heads, num_tokens, num_bytes = labels.codes.shape[1:]
    if num_channels != 2 * num_bytes:
        raise ValueError(f"query: {num_channels} channels, but labels have {2 * num_bytes}")
    tokens = (batch, num_kv_heads, num_tokens)
    arguments.check_shape("labels.codes", labels.codes, (*tokens, num_bytes))
    arguments.check_shape("labels.step", labels.step, tokens)
    arguments.check_shape("labels.zero", labels.zero, tokens)
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"labels: {num_kv_heads} heads do not divide the {num_heads} of query")
    if block_indices.ndim != 3:
        raise ValueError(f"block_indices: expected [B, K, L], got {list(block_indices.shape)}")
    shape = (batch, num_kv_heads, block_indices.shape[2])
    arguments.check_integers("block_indices", block_indices, shape)
    arguments.check_integers("lengths", lengths, (batch,))
