"""Bad arguments of each operation: an error that names the argument."""

import jax.numpy as jnp
import pytest

from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.selected_attention import selected_attention
from pallas_kernels.sliding_window_attention import sliding_window_attention

TOKENS = {
    "query": jnp.zeros((2, 32, 4, 6)),
    "key": jnp.zeros((2, 32, 2, 6)),
    "value": jnp.zeros((2, 32, 2, 5)),
}
BLOCKS = {"query": TOKENS["query"], "key": jnp.zeros((2, 2, 2, 6))}
VALID = {
    sliding_window_attention: {**TOKENS, "window_size": 4},
    compressed_attention: {
        **BLOCKS,
        "value": jnp.zeros((2, 2, 2, 5)),
        "block_size": 16,
        "stride": 16,
    },
    select_blocks: {
        **BLOCKS,
        "lse": jnp.zeros((2, 32, 4)),
        "num_selected_blocks": 2,
        "block_size": 16,
        "compression_block_size": 16,
        "compression_stride": 16,
        "queries_per_selection": 4,
    },
    selected_attention: {
        **TOKENS,
        "block_indices": jnp.zeros((2, 8, 2, 3), jnp.int32),
        "block_size": 16,
        "queries_per_selection": 4,
    },
}
ATTENTION = [sliding_window_attention, compressed_attention, selected_attention]
EVERY = list(VALID)
BAD = [
    (EVERY, {"query": jnp.zeros((2, 32, 6))}, r"query: expected \[B, T, N, H\]"),
    (EVERY, {"key": jnp.zeros((2, 32, 6))}, r"key: expected \[B, S, K, H\]"),
    (EVERY, {"key": jnp.zeros((2, 31, 2, 6))}, "key: expected shape"),
    (EVERY, {"key": jnp.zeros((2, 1, 2, 6))}, "key: expected shape"),
    (EVERY, {"query": jnp.zeros((2, 32, 3, 6)), "lse": jnp.zeros((2, 32, 3))}, "key: its 2 heads"),
    (EVERY, {"segment_ids": jnp.zeros((2, 31), jnp.int32)}, "segment_ids: expected shape"),
    (EVERY, {"segment_ids": jnp.zeros((2, 32))}, "segment_ids: expected integers"),
    (EVERY, {"implementation": "triton"}, "implementation: expected"),
    (ATTENTION, {"value": jnp.zeros((2, 32, 5))}, "value: expected"),
    (ATTENTION, {"value": jnp.zeros((2, 3, 2, 5))}, "value: expected shape"),
    (ATTENTION, {"value_dim": 6}, "value_dim: 6, but"),
    (ATTENTION, {"value": None}, "value_dim: value=None needs 1 .. 6"),
    (ATTENTION, {"value": None, "value_dim": 7}, "value_dim: .* got 7"),
    ([sliding_window_attention], {"window_size": 0}, "window_size: expected an int of at least 1"),
    ([compressed_attention], {"stride": 0}, "stride: expected an int"),
    ([selected_attention], {"block_size": 16.0}, "block_size: expected an int"),
    ([select_blocks], {"num_selected_blocks": -1}, "num_selected_blocks: expected an int"),
    ([select_blocks], {"lse": jnp.zeros((2, 32, 3))}, "lse: expected shape"),
    ([select_blocks], {"compression_stride": 5}, "compression_stride: 5 does not divide"),
    (
        [select_blocks, selected_attention],
        {"queries_per_selection": 5},
        "queries_per_selection: 5 does not divide block_size 16",
    ),
    (
        [selected_attention],
        {"block_indices": jnp.zeros((2, 7, 2, 3), jnp.int32)},
        "block_indices: expected shape",
    ),
    (
        [selected_attention],
        {"block_indices": jnp.zeros((2, 8, 3), jnp.int32)},
        "block_indices: expected",
    ),
    (
        [selected_attention],
        {"block_indices": jnp.zeros((2, 8, 2, 3))},
        "block_indices: expected integers",
    ),
]


def call(operation, **changes):
    allowed = VALID[operation].keys() | {"value_dim", "segment_ids", "implementation"}
    changes = {name: value for name, value in changes.items() if name in allowed}
    return operation(**VALID[operation] | changes)


@pytest.mark.parametrize(
    ("operation", "changes", "message"),
    [(operation, changes, message) for ops, changes, message in BAD for operation in ops],
    ids=lambda argument: getattr(argument, "__name__", ""),
)
def test_bad_argument_is_named(operation, changes, message):
    with pytest.raises(ValueError, match=message):
        call(operation, **changes)


@pytest.mark.parametrize("operation", EVERY)
def test_kernel_asked_for_where_there_is_none_is_an_error(operation, no_hopper):
    with pytest.raises(NotImplementedError, match=operation.__name__):
        call(operation, implementation="mosaic_gpu")
