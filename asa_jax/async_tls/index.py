"""The two-level index of a cache: bounds of blocks and labels of tokens, kept up by appending.

Level 1 is Quest's bound (Tang et al., 2024): of the keys k_s of a block, with channel-wise maximum
M and minimum m, sum_c max(q_c M_c, q_c m_c) >= max_s q . k_s. As one matrix product,

    u = relu([q | -q]) . [M | -m],    [M | -m] = max_s [k_s | -k_s],

an exact rewriting that needs one running maximum a block. The stored bounds are keys themselves and
so exact in any dtype; products are summed in float32, whose rounding alone, at most about
2H 2^-24 sum_c |q_c| max(|M_c|, |m_c|), can put a computed u below a score.

Level 2 is described in `labels.py`. The tail, a block that is being filled, has bounds of the
tokens it holds so far.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from asa_jax.async_tls.labels import make_labels
from pallas_kernels.async_tls_select_tokens.reference import Labels


class Index(NamedTuple):
    """Index of the keys [B, S, K, H] of one layer; C = S / block_size blocks.

    Attributes:
        bounds: [B, K, C, 2H] in the dtype of the keys; the least finite number where no token is.
        labels: over [B, K, S]; whatever where no token is.
        lengths: int32 [B], tokens in the index.
    """

    bounds: Any
    labels: Labels
    lengths: Any

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.labels.step.shape[2] // self.bounds.shape[2]


def init_index(
    batch: int,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    num_channels: int,
    block_size: int,
    dtype: jnp.dtype,
) -> Index:
    """An index of no tokens.

    Args:
        batch: rows, B.
        max_length: tokens that a row can hold, S, a multiple of block_size.
        num_kv_heads: key heads, K; 1 for absorbed latents.
        head_dim: features of a key, H; latent and rotated ones for absorbed latents.
        num_channels: features of a label, r, even.
        block_size: tokens of a block.
        dtype: of the keys.

    Raises:
        ValueError: max_length is no multiple of block_size, or num_channels is odd.
    """
    if max_length % block_size:
        raise ValueError(f"max_length: {max_length} is no multiple of block_size {block_size}")
    if num_channels % 2:
        raise ValueError(f"num_channels: {num_channels} is odd; two share a byte")
    tokens = (batch, num_kv_heads, max_length)
    bounds = (batch, num_kv_heads, max_length // block_size, 2 * head_dim)
    return Index(
        # Finite, because 0 * inf would be NaN in the product with a query.
        bounds=jnp.full(bounds, jnp.finfo(dtype).min, dtype),
        labels=Labels(
            codes=jnp.zeros((*tokens, num_channels // 2), jnp.uint8),
            step=jnp.zeros(tokens, jnp.float16),
            zero=jnp.zeros(tokens, jnp.float16),
        ),
        lengths=jnp.zeros(batch, jnp.int32),
    )


def append(
    index: Index, key: jax.Array, channels: jax.Array, counts: jax.Array | None = None
) -> Index:
    """Appends tokens to an index: a decoded token (T = 1) or a chunk of a prompt.

    Args:
        index: of `lengths` tokens.
        key: [B, T, K, H]; what goes beyond the index's S is dropped.
        channels: int32 [K, r], the features of labels.
        counts: int32 [B], how many of the T tokens each row gets, the first ones; None for all.

    Returns:
        The index of lengths + counts tokens.
    """
    counts = jnp.full(key.shape[0], key.shape[1], jnp.int32) if counts is None else counts
    bounds = _raise_bounds(index.bounds, key, index.lengths, counts, index.block_size)
    labels = _write_labels(index.labels, make_labels(key, channels), index.lengths, counts)
    return Index(bounds, labels, jnp.minimum(index.lengths + counts, labels.step.shape[2]))


def _raise_bounds(
    bounds: jax.Array, key: jax.Array, lengths: jax.Array, counts: jax.Array, block_size: int
) -> jax.Array:
    """Bounds after tokens key [B, T, K, H] came to blocks that held `lengths` tokens."""
    batch, size, _, _ = key.shape
    touched = (size + block_size - 2) // block_size + 1
    # Tokens laid out by block: number t of the chunk stands at lengths % block_size + t.
    number = jnp.arange(touched * block_size) - (lengths % block_size)[:, None]
    here = (number >= 0) & (number < counts[:, None])
    rows = jnp.arange(batch)[:, None]
    tokens = key[rows, jnp.clip(number, 0, size - 1)]
    both = jnp.concatenate([tokens, -tokens], axis=-1).astype(bounds.dtype)
    both = jnp.where(here[..., None, None], both, jnp.finfo(bounds.dtype).min)
    maxima = both.reshape(batch, touched, block_size, *both.shape[2:]).max(2)
    blocks = lengths[:, None] // block_size + jnp.arange(touched)
    return bounds.at[rows, :, blocks].max(maxima, mode="drop")


def _write_labels(labels: Labels, new: Labels, lengths: jax.Array, counts: jax.Array) -> Labels:
    """Writes labels over [B, T, K] behind the `lengths` tokens of labels over [B, K, S]."""
    batch, size, _ = new.step.shape
    number = jnp.arange(size)
    beyond = labels.step.shape[2]  # where a write is dropped
    position = jnp.where(number < counts[:, None], lengths[:, None] + number, beyond)
    rows = jnp.arange(batch)[:, None]
    return jax.tree.map(lambda old, x: old.at[rows, :, position].set(x, mode="drop"), labels, new)
