"""Attention of one new token a row to tokens of a cache that a list names, as in AsyncTLS."""

from pallas_kernels.async_tls_attention.api import async_tls_attention

__all__ = ["async_tls_attention"]
