"""The least time of an operation: what it computes and moves, over what an H100 can do."""

from typing import NamedTuple

from pallas_kernels.blocks import number_of_blocks
from pallas_kernels.cases import Case

# What an H100 was measured to do: dense products, reads from L2, reads and writes of its memory.
FLOPS_PER_SECOND = 750e12
L2_BYTES_PER_SECOND = 6.5e12
HBM_BYTES_PER_SECOND = 2.85e12
ITEM_BYTES = 2  # bfloat16


class Work(NamedTuple):
    """What a call cannot do without: operations, and bytes from L2 and from memory."""

    flops: float = 0
    l2_bytes: float = 0
    hbm_bytes: float = 0

    def milliseconds(self) -> float:
        """Returns the least time of it all, the larger of three."""
        return 1e3 * max(
            self.flops / FLOPS_PER_SECOND,
            self.l2_bytes / L2_BYTES_PER_SECOND,
            self.hbm_bytes / HBM_BYTES_PER_SECOND,
        )


def num_compressed(case: Case) -> int:
    """Compressed blocks of a row."""
    return number_of_blocks(case.num_tokens, case.compression_block_size, case.compression_stride)


def attention_work(case: Case, backward: bool, pairs: float, l2_bytes: float = 0) -> Work:
    """Work of attention with so many pairs of a query token and a key."""
    dims = case.head_dim + case.value_dim
    # Backward: scores anew, dP, dQ and dK have the width of a score or of a value; so has dV.
    widths = dims + (3 * case.head_dim + 2 * case.value_dim if backward else 0)
    flops = 2.0 * pairs * case.num_heads * widths
    of_query = case.num_tokens * case.num_heads * dims * ITEM_BYTES
    return Work(flops, l2_bytes, of_query * (3 if backward else 1))


def dense_work(case: Case, backward: bool) -> list[Work]:
    """Every earlier token."""
    return [attention_work(case, backward, case.num_tokens**2 / 2)]


def window_work(case: Case, backward: bool) -> list[Work]:
    """The tokens of the window."""
    return [attention_work(case, backward, case.num_tokens * case.window_size)]


def compressed_work(case: Case, backward: bool) -> list[Work]:
    """Every earlier block."""
    return [attention_work(case, backward, case.num_tokens * num_compressed(case) / 2)]


def select_work(case: Case, _: bool) -> list[Work]:
    """Scores of first queries, and the bytes of these and of lists."""
    rows = case.num_tokens / case.queries_per_selection
    flops = 2.0 * rows * case.num_heads * case.head_dim * num_compressed(case) / 2
    of_query = rows * case.num_heads * case.head_dim * ITEM_BYTES
    return [Work(flops, 0, of_query + rows * case.num_kv_heads * case.num_selected_blocks * 4)]


def selected_work(case: Case, backward: bool) -> list[Work]:
    """The tokens of the lists, fetched by each group; backward, also the groups of each block."""
    seen = min(case.num_tokens / 2, case.num_selected_blocks * case.block_size)
    width = case.head_dim + (0 if case.shares_value else case.value_dim)
    fetches = case.num_tokens / case.queries_per_selection * case.num_kv_heads
    keys = fetches * seen * width * ITEM_BYTES
    group_rows = case.queries_per_selection * case.num_heads / case.num_kv_heads
    groups = fetches * seen / case.block_size * group_rows
    groups *= (case.head_dim + case.value_dim) * ITEM_BYTES
    l2_bytes = 2 * keys + groups if backward else keys
    return [attention_work(case, backward, case.num_tokens * seen, l2_bytes)]
