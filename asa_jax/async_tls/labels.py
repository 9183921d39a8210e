"""Labels of tokens: some channels of their keys in four bits each.

A label quantises r calibrated channels x of a key asymmetrically, with one scale and one zero point
for the token and head: x = zero + scale * code, codes 0 .. 15. Zero is rounded down to float16, so
that no channel lies below code 0; scale is rounded to the nearest, which moves code 15 by less than
a hundredth of a step. So no channel is off by more than scale / 2, but for float32 rounding. Keys
must lie within float16's range, +-65504.

Byte j of a label holds channel j in its low half and channel j + r / 2 in its high half.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_LEVELS = 15
# The least normal float16: finer steps would be flushed to zero on some hardware.
_LEAST_SCALE = 2.0**-14


class Labels(NamedTuple):
    """Labels of tokens; leading axes as the keys they are from.

    Attributes:
        codes: uint8 [..., r / 2], two channels a byte.
        scale: float16 [...], the step between codes.
        zero: float16 [...], what code 0 stands for.
    """

    codes: Any
    scale: Any
    zero: Any


def make_labels(key: jax.Array, channels: jax.Array) -> Labels:
    """Quantises the chosen channels of keys.

    Args:
        key: [..., K, H].
        channels: int32 [K, r], r even, which features of each head.

    Returns:
        Labels over [..., K].
    """
    x = take_channels(key, channels).astype(jnp.float32)
    zero = _round_down(x.min(-1))
    zero32 = zero.astype(jnp.float32)
    scale = jnp.maximum((x.max(-1) - zero32) / _LEVELS, _LEAST_SCALE).astype(jnp.float16)
    steps = (x - zero32[..., None]) / scale.astype(jnp.float32)[..., None]
    codes = jnp.clip(jnp.round(steps), 0, _LEVELS).astype(jnp.uint8)
    low, high = jnp.split(codes, 2, axis=-1)
    return Labels(low | (high << 4), scale, zero)


def take_channels(x: jax.Array, channels: jax.Array) -> jax.Array:
    """The features channels [K, r] of x [..., K, H]: [..., K, r]."""
    index = jnp.broadcast_to(channels, (*x.shape[:-1], channels.shape[-1]))
    return jnp.take_along_axis(x, index, axis=-1)


def unpack(codes: jax.Array) -> jax.Array:
    """Codes 0 .. 15 of bytes [..., r / 2]: uint8 [..., r]."""
    return jnp.concatenate([codes & 15, codes >> 4], axis=-1)


def dequantise(labels: Labels) -> jax.Array:
    """The channels that labels stand for: float32 [..., r]."""
    scale, zero = (x.astype(jnp.float32)[..., None] for x in (labels.scale, labels.zero))
    return zero + scale * unpack(labels.codes).astype(jnp.float32)


def label_scores(query: jax.Array, labels: Labels) -> jax.Array:
    """Scores sum_c q_c (zero + scale code_c) of queries against labels, from the codes as they are.

    Args:
        query: [B, K, G, r], the channels of the labels.
        labels: over [B, K, S].

    Returns:
        float32 [B, K, G, S].
    """
    codes = unpack(labels.codes).astype(query.dtype)
    products = jnp.einsum("BKGR,BKSR->BKGS", query, codes, preferred_element_type=jnp.float32)
    scale, zero = (x.astype(jnp.float32)[:, :, None] for x in (labels.scale, labels.zero))
    return scale * products + zero * query.sum(-1, dtype=jnp.float32)[..., None]


def _round_down(x: jax.Array) -> jax.Array:
    """The greatest float16 that is not above float32 x."""
    nearest = x.astype(jnp.float16)
    below = jnp.nextafter(nearest, jnp.float16(-jnp.inf))
    return jnp.where(nearest.astype(jnp.float32) > x, below, nearest)
