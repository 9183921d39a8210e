"""Attention of one new token over a cache, and the writing of caches.

A cache array holds tokens on axis 1. Layers with a window keep a ring: token p lies in slot
p % window_size. `position` is that of the new token in its row, so rows may have different lengths.
"""

import jax
import jax.numpy as jnp


def ring_positions(position: jax.Array, window_size: int) -> jax.Array:
    """Position of the newest token of each ring slot, up to `position`; negative where empty.

    Args:
        position: int [B], position of the newest token written.
        window_size: number of slots.

    Returns:
        int [B, window_size].
    """
    slots = jnp.arange(window_size)
    return position[:, None] - (position[:, None] - slots) % window_size


def fill(cache: jax.Array, tokens: jax.Array) -> jax.Array:
    """Writes tokens [B, T, ...] from slot 0 of a cache [B, S, ...] with S >= T."""
    return cache.at[:, : tokens.shape[1]].set(tokens.astype(cache.dtype))


def fill_ring(cache: jax.Array, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Writes the last of each row's `lengths` [B] real tokens, of [B, T, ...], to a ring."""
    positions = ring_positions(lengths - 1, cache.shape[1])
    index = jnp.clip(positions, 0, tokens.shape[1] - 1)
    index = index.reshape(index.shape + (1,) * (tokens.ndim - 2))
    return jnp.take_along_axis(tokens, index, axis=1).astype(cache.dtype)


def write(cache: jax.Array, slot: jax.Array, token: jax.Array) -> jax.Array:
    """Writes one token [B, ...] a row to slot [B] of a cache [B, S, ...]."""
    return cache.at[jnp.arange(cache.shape[0]), slot].set(token.astype(cache.dtype))


def write_if(cache: jax.Array, slot: jax.Array, token: jax.Array, keep: jax.Array) -> jax.Array:
    """As `write`, in the rows where `keep` [B] holds."""
    rows = jnp.arange(cache.shape[0])
    slot = jnp.clip(slot, 0, cache.shape[1] - 1)
    keep = keep.reshape(keep.shape + (1,) * (token.ndim - 1))
    return cache.at[rows, slot].set(jnp.where(keep, token.astype(cache.dtype), cache[rows, slot]))


def attend_cache(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of one query a row.

    Args:
        query: [B, N, H].
        key: [B, S, K, H].
        value: [B, S, K, h].
        visible: bool [B, S] or [B, S, K].
        scale: factor on the scores.

    Returns:
        The output [B, N, h], zero where nothing is visible, and the probabilities float32
        [B, K, G, S].
    """
    batch, heads, size = query.shape
    groups = key.shape[2]
    grouped = query.reshape(batch, groups, heads // groups, size)
    scores = jnp.einsum("BKGH,BSKH->BKGS", grouped, key, preferred_element_type=jnp.float32) * scale
    if visible.ndim == 2:
        visible = visible[:, :, None]
    mask = jnp.moveaxis(visible, 1, 2)[:, :, None]
    probabilities = jnp.where(mask, jax.nn.softmax(scores, where=mask, axis=-1), 0)
    output = jnp.einsum("BKGS,BSKh->BKGh", probabilities.astype(value.dtype), value)
    return output.reshape(batch, heads, -1), probabilities
