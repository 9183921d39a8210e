"""Calls of the operations by their sizes, shared by tests and benchmark."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blocks import number_of_blocks


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call of every operation, in tokens where they are lengths.

    `document_lengths` packs documents in each row, every one from the next multiple of block_size,
    and pads the rest; none of them means one document that fills the row. `shares_value` makes the
    value the first `value_dim` numbers of the key.
    """

    name: str
    num_tokens: int
    batch: int = 1
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 12
    value_dim: int = 8
    shares_value: bool = False
    document_lengths: tuple[int, ...] = ()
    window_size: int = 16
    compression_block_size: int = 16
    compression_stride: int = 16
    block_size: int = 16
    num_selected_blocks: int = 4
    queries_per_selection: int = 4

    def __str__(self) -> str:
        return self.name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of one call; values are None where they are a prefix of the keys."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, T, K, H]
    value: jax.Array | None  # [B, T, K, h]
    compressed_key: jax.Array  # [B, C, K, H]
    compressed_value: jax.Array | None  # [B, C, K, h]


def make_inputs(case: Case, seed: int, dtype: jnp.dtype) -> Inputs:
    """Draws the arrays of a case from a normal distribution."""
    random = np.random.default_rng(seed)
    num_blocks = number_of_blocks(
        case.num_tokens, case.compression_block_size, case.compression_stride
    )

    def normal(length: int, heads: int, dim: int) -> jax.Array:
        shape = (case.batch, length, heads, dim)
        return jnp.asarray(random.standard_normal(shape, np.float32), dtype)

    def value(length: int) -> jax.Array | None:
        return None if case.shares_value else normal(length, case.num_kv_heads, case.value_dim)

    return Inputs(
        query=normal(case.num_tokens, case.num_heads, case.head_dim),
        key=normal(case.num_tokens, case.num_kv_heads, case.head_dim),
        value=value(case.num_tokens),
        compressed_key=normal(num_blocks, case.num_kv_heads, case.head_dim),
        compressed_value=value(num_blocks),
    )


def make_segment_ids(case: Case) -> jax.Array | None:
    """Returns the documents of a case, int32 [B, T], None for one that fills the row."""
    if not case.document_lengths:
        return None
    row = np.zeros(case.num_tokens, np.int32)
    start = 0
    for document, length in enumerate(case.document_lengths, start=1):
        row[start : start + length] = document
        start += -(-length // case.block_size) * case.block_size
    return jnp.asarray(np.broadcast_to(row, (case.batch, case.num_tokens)))


_NSA_SIZES: dict[str, Any] = {
    "compression_block_size": 32,
    "compression_stride": 16,
    "block_size": 64,
    "queries_per_selection": 1,
}

# Every edge of the definitions, small enough for a dense float64 oracle.
SMALL_CASES = (
    Case("one_token", num_tokens=1),
    Case("no_complete_block", num_tokens=15, window_size=4, num_kv_heads=4),
    Case("one_block", num_tokens=16, window_size=1, num_kv_heads=1),
    Case("odd_length", num_tokens=37, batch=2, window_size=7, num_selected_blocks=2),
    Case("all_in_reach", 41, window_size=100, num_selected_blocks=8, num_heads=3, num_kv_heads=1),
    Case("shared_latent", 123, batch=2, num_kv_heads=1, shares_value=True, window_size=50),
    Case("packed", num_tokens=133, document_lengths=(5, 33, 16, 37), window_size=11),
    Case("all_padding", num_tokens=20, document_lengths=(0,)),
    Case("nsa_packed", 300, document_lengths=(200, 41), num_selected_blocks=3, **_NSA_SIZES),
)
