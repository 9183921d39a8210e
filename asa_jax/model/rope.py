"""Rotary position embedding (Su et al., 2021) over the two halves of a head, stretched or not."""

import math

import jax
import jax.numpy as jnp

from asa_jax.config_parts import RopeScalingConfig


def rotate(
    x: jax.Array, positions: jax.Array, theta: float, scaling: RopeScalingConfig | None = None
) -> jax.Array:
    """Rotates feature pairs (i, i + H/2) of x by the angle position * theta^(-2i/H).

    Args:
        x: [..., T, heads, H], H even.
        positions: int [..., T], in tokens from the start of the document.
        theta: base of the wavelengths.
        scaling: how they are stretched; None: not at all.

    Returns:
        Array of the shape and dtype of x.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    factor = 1.0
    if scaling is not None:
        frequencies = scale_frequencies(frequencies, theta, scaling)
        factor = scaling.attention_factor
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    first, second = wide[..., :half], wide[..., half:]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def scale_frequencies(
    frequencies: jax.Array, theta: float, scaling: RopeScalingConfig
) -> jax.Array:
    """Divides the slow frequencies by a factor, keeps the fast ones and interpolates between.

    With r turns of a feature in `original_length` tokens the share of what is kept rises from 0 to
    1: in Llama 3.1 linearly in r from low_ to high_frequency_factor, in YaRN (arXiv 2309.00071,
    section 3.2) linearly in the number of the feature, from beta_slow to beta_fast turns.

    Args:
        frequencies: float [H / 2], theta^(-2i/H).
        theta: base of the wavelengths.
        scaling: its kind and bounds.

    Returns:
        float [H / 2].
    """
    match scaling.kind:
        case "none":
            return frequencies
        case "llama3":
            turns = scaling.original_length * frequencies / (2 * math.pi)
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            kept = (turns - low) / (high - low)
        case _:
            first, last = _interpolated_features(2 * len(frequencies), theta, scaling)
            kept = (last - jnp.arange(len(frequencies))) / (last - first)
    kept = jnp.clip(kept, 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _interpolated_features(
    head_dim: int, theta: float, scaling: RopeScalingConfig
) -> tuple[float, float]:
    """The features that turn beta_fast and beta_slow times, between which YaRN interpolates."""

    def feature(turns: float) -> float:
        return head_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (
            2 * math.log(theta)
        )  # fmt: skip

    first, last = feature(scaling.beta_fast), feature(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # Where both are one feature, that is the border.
    return first, last if last != first else last + 1e-3
