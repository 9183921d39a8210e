"""Definition of decode_linear in XLA."""

import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.masked_attention import statistics_dtype


def decode_linear(
    x: jax.Array,
    weight: jax.Array,
    norm_scale: jax.Array | None,
    residual: jax.Array | None,
    epsilon: float,
    gated: bool,
    widths: tuple[int, ...],
) -> list[jax.Array]:
    """See `api.decode_linear`, with all widths."""
    if norm_scale is not None:
        x = _rms_norm(x, norm_scale, epsilon)
    y = x @ weight
    if gated:
        gate, up = jnp.split(y, 2, axis=-1)
        y = jax.nn.silu(gate) * up
    y = y if residual is None else residual + y
    return jnp.split(y, list(itertools.accumulate(widths[:-1])), axis=-1)


def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    wide = x.astype(statistics_dtype(x.dtype))
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)
