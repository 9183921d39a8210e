"""Causal attention to compressed blocks of tokens."""

from pallas_kernels.compressed_attention.api import compressed_attention

__all__ = ["compressed_attention"]
