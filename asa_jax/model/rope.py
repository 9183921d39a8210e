"""Rotary position embedding (Su et al., 2021) over the two halves of a head."""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotates feature pairs (i, i + H/2) of x by the angle position * theta^(-2i/H).

    Args:
        x: [..., T, heads, H], H even.
        positions: int [..., T], in tokens from the start of the document.
        theta: base of the wavelengths.

    Returns:
        Array of the shape and dtype of x.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    first, second = wide[..., :half], wide[..., half:]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
