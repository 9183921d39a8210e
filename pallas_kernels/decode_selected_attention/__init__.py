"""Attention of one new token a row to blocks of a cache that a list names."""

from pallas_kernels.decode_selected_attention.api import decode_selected_attention

__all__ = ["decode_selected_attention"]
