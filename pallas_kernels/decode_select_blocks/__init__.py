"""Choice of the blocks of a cache that one new token a row attends to."""

from pallas_kernels.decode_select_blocks.api import decode_select_blocks

__all__ = ["decode_select_blocks"]
