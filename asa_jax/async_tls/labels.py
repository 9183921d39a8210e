"""Labels of tokens: some channels of their keys in four bits each.

A label quantises r calibrated channels x of a key asymmetrically, with one step and one zero point
for the token and head: x = zero + step * code, codes 0 .. 15. Zero is rounded down to float16, so
that no channel lies below code 0; the step is rounded to the nearest, which moves code 15 by less
than a hundredth of a step. So no channel is off by more than step / 2, but for float32 rounding.
Keys must lie within float16's range, +-65504.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.async_tls_select_tokens.reference import Labels, unpack

_LEVELS = 15
# The least normal float16: finer steps would be flushed to zero on some hardware.
_LEAST_STEP = 2.0**-14


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
    step = jnp.maximum((x.max(-1) - zero32) / _LEVELS, _LEAST_STEP).astype(jnp.float16)
    steps = (x - zero32[..., None]) / step.astype(jnp.float32)[..., None]
    codes = jnp.clip(jnp.round(steps), 0, _LEVELS).astype(jnp.uint8)
    low, high = jnp.split(codes, 2, axis=-1)
    return Labels(low | (high << 4), step, zero)


def take_channels(x: jax.Array, channels: jax.Array) -> jax.Array:
    """The features channels [K, r] of x [..., K, H]: [..., K, r]."""
    index = jnp.broadcast_to(channels, (*x.shape[:-1], channels.shape[-1]))
    return jnp.take_along_axis(x, index, axis=-1)


def dequantise(labels: Labels) -> jax.Array:
    """The channels that labels stand for: float32 [..., r]."""
    step, zero = (x.astype(jnp.float32)[..., None] for x in (labels.step, labels.zero))
    return zero + step * unpack(labels.codes).astype(jnp.float32)


def _round_down(x: jax.Array) -> jax.Array:
    """The greatest float16 that is not above float32 x."""
    nearest = x.astype(jnp.float16)
    below = jnp.nextafter(nearest, jnp.float16(-jnp.inf))
    return jnp.where(nearest.astype(jnp.float32) > x, below, nearest)
