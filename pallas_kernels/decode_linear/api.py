"""Entry point of decode_linear."""

from collections.abc import Sequence

import jax

from pallas_kernels import arguments, dispatch
from pallas_kernels.decode_linear import mosaic_gpu, reference


def decode_linear(
    x: jax.Array,  # [B, D]
    weight: jax.Array,  # [D, F]
    *,
    norm_scale: jax.Array | None = None,  # [D]
    residual: jax.Array | None = None,  # [B, F], or [B, F / 2] if gated
    epsilon: float = 1e-6,
    gated: bool = False,
    widths: Sequence[int] | None = None,
    implementation: dispatch.Implementation | None = None,
) -> list[jax.Array]:  # [B, width] each
    """Multiplies few rows with a weight, normalised before and gated or added up after.

    y = n(x) W with n(x) = x / sqrt(mean(x^2) + epsilon) * norm_scale (RMSNorm, arXiv 1910.07467);
    gated, y = silu(y_1) * y_2 of the halves of its features (SwiGLU, arXiv 2002.05202); then
    residual + y. A step of decoding is bound by the bytes of its weights and by the number of its
    kernels, and this is one.

    Args:
      x: [B, D].
      weight: [D, F], in the dtype of x.
      norm_scale: [D], of the norm; None = x as it is.
      residual: [B, F], or [B, F / 2] if gated, to add the result to; None = 0.
      epsilon: Of the norm.
      gated: Whether the first half of the features gates the second.
      widths: Features of the results, which are arrays of their own; None = one of all.
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Returns:
      [B, width] for each width, in the dtype of x.

    Raises:
      ValueError: An argument has a wrong shape or type.
      NotImplementedError: The implementation asked for cannot take the call.
    """
    _check(x, weight, norm_scale, residual, gated)
    features = weight.shape[1] // (1 + gated)
    widths = (features,) if widths is None else tuple(widths)
    if sum(widths) != features:
        raise ValueError(f"widths: {list(widths)} are {sum(widths)} together, not {features}")
    call = x, weight, norm_scale, residual, epsilon, gated, widths
    return dispatch.run(
        "decode_linear",
        implementation,
        mosaic_gpu=lambda: mosaic_gpu.decode_linear(*call),
        xla=lambda: reference.decode_linear(*call),
    )


def _check(
    x: jax.Array,
    weight: jax.Array,
    norm_scale: jax.Array | None,
    residual: jax.Array | None,
    gated: bool,
) -> None:
    if x.ndim != 2:
        raise ValueError(f"x: expected [B, D], got shape {list(x.shape)}")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected [D, F], got shape {list(weight.shape)}")
    (rows, size), features = x.shape, weight.shape[1]
    arguments.check_shape("weight", weight, (size, features))
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: expected {x.dtype} as x, got {weight.dtype}")
    if gated and features % 2:
        raise ValueError(f"weight: {features} features have no halves")
    if norm_scale is not None:
        arguments.check_shape("norm_scale", norm_scale, (size,))
    if residual is not None:
        arguments.check_shape("residual", residual, (rows, features // (1 + gated)))
        if residual.dtype != x.dtype:
            raise ValueError(f"residual: expected {x.dtype} as x, got {residual.dtype}")
