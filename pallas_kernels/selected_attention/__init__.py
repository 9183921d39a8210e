"""Causal attention to a list of selected blocks of tokens."""

from pallas_kernels.selected_attention.api import selected_attention

__all__ = ["selected_attention"]
