"""Choice of blocks of a cache by the bounds of their keys, level 1 of AsyncTLS."""

from pallas_kernels.async_tls_select_blocks.api import async_tls_select_blocks

__all__ = ["async_tls_select_blocks"]
