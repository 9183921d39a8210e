"""Choice of the blocks that each group of queries attends to."""

from pallas_kernels.select_blocks.api import select_blocks
from pallas_kernels.select_blocks.reference import block_importance

__all__ = ["block_importance", "select_blocks"]
