"""Product of few rows with a weight, with what stands before and after it in a layer."""

from pallas_kernels.decode_linear.api import decode_linear

__all__ = ["decode_linear"]
