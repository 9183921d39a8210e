"""select_blocks on Hopper GPUs: a kernel scores blocks, another lists the largest scores.

Only blocks between the first of the document and the one before the query's compete, since these
three are always on the list. Every compressed block that shares tokens with a competitor is
complete at the query and lies in its document, so that scores need no mask.

Rows are worked on in ranges, so that neither memory nor time is spent on what lies far above the
diagonal, and a range in chunks, so that scores never take more than `MAX_SCORES` at a time. Queries
that are a part of the row are one range, chosen on the device by where they end.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import blocks
from pallas_kernels.mosaic import tiles
from pallas_kernels.select_blocks.largest import MAX_LIST, largest
from pallas_kernels.select_blocks.scores import COLUMNS_MULTIPLE, Tap, Tiling, importance, tiling

MAX_SCORES = 2**26  # float32 numbers in memory at a time
MAX_HEAD_DIM = 320
NO_BLOCK = 2**30  # after all others


def select_blocks(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array,
    num_selected_blocks: int,
    block_size: int,
    compression_block_size: int,
    compression_stride: int,
    queries_per_selection: int,
    segment_ids: jax.Array | None,
    scale: float,
    query_offset: jax.Array | int | None = None,
    *,
    sizes: Tiling | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See `api.select_blocks`; `sizes` and `interpret` are for tests.

    Raises:
      NotImplementedError: The kernels do not take this type or size.
    """
    check_supported(query, key, num_selected_blocks)
    taps = overlaps(block_size, compression_block_size, compression_stride)
    sizes = sizes or tiling(len(taps), query.shape[3])
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    num_tokens = length if segment_ids is None else segment_ids.shape[1]
    step, num_blocks = queries_per_selection, pl.cdiv(num_tokens, block_size)
    num_groups = pl.cdiv(length, step)
    num_rows = num_groups + -num_groups % tiles.ROWS

    query = pad_axis1(query, 0, num_rows * step - length)
    query = query.reshape(batch, num_rows, step, num_heads, head_dim)
    key = tapped_keys(
        key, taps, num_blocks + -num_blocks % sizes.columns, compression_stride, block_size
    )
    lse = pad_axis1(lse[:, ::step] * tiles.LOG2E, 0, num_rows - num_groups)
    lse = lse.reshape(batch, num_rows, num_kv_heads, -1).transpose(0, 2, 3, 1)
    positions, visible_from = (
        x[:, ::step] for x in blocks.query_rows(segment_ids, length, query_offset)
    )
    bounds = block_bounds(positions, visible_from, batch, block_size, num_rows)

    def list_chunk(start: jax.Array, num_chunk_rows: int, num_columns: int) -> jax.Array:
        own, first = (lax.dynamic_slice_in_dim(x, start, num_chunk_rows, axis=1) for x in bounds)
        scores = importance(
            query, key, lse, own, first, start, num_columns=num_columns, taps=taps,
            exponent=scale * tiles.LOG2E, sizes=sizes, interpret=interpret,
        )  # fmt: skip
        return largest(scores, own, first, size=num_selected_blocks, interpret=interpret)

    def list_range(num_columns: int, begin: int, end: int) -> jax.Array:
        list_rows = functools.partial(list_chunk, num_columns=num_columns)
        return map_rows(list_rows, begin, end, MAX_SCORES // (batch * num_kv_heads * num_columns))

    columns = column_ranges(num_blocks)
    if query_offset is not None:
        last_block = (query_offset + length - 1) // block_size
        which = jnp.searchsorted(jnp.array(columns), last_block, side="right")
        ranges = [functools.partial(list_range, number, 0, num_rows) for number in columns]
        return lax.switch(which, ranges)[:, :num_groups]
    ends = [min(number * block_size // step, num_rows) for number in columns]
    lists = [list_range(*sizes) for sizes in zip(columns, [0, *ends], ends, strict=False)]
    return jnp.concatenate(lists, axis=1)[:, :num_groups]


def check_supported(query: jax.Array, key: jax.Array, num_selected_blocks: int) -> None:
    """Raises NotImplementedError unless the kernels take arrays and lists like these."""
    if query.dtype not in (jnp.bfloat16, jnp.float16) or key.dtype != query.dtype:
        raise NotImplementedError(f"query {query.dtype}, key {key.dtype}: not both of 16 bits")
    head_dim = query.shape[3]
    if head_dim % 32 or head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(f"head dim {head_dim}: not a multiple of 32 to {MAX_HEAD_DIM}")
    if not 3 <= num_selected_blocks <= MAX_LIST:
        raise NotImplementedError(f"num_selected_blocks {num_selected_blocks}: not 3 .. {MAX_LIST}")
    if 0 in query.shape or 0 in key.shape:
        raise NotImplementedError(f"query {query.shape}, key {key.shape}: empty")


def overlaps(block_size: int, compression_block_size: int, stride: int) -> tuple[Tap, ...]:
    """Returns the compressed blocks that share tokens with a block; see `reference`.

    Raises:
      NotImplementedError: One may reach past the block after it, and so need a mask.
    """
    if compression_block_size - stride > block_size:
        raise NotImplementedError(
            f"compression_block_size {compression_block_size}: more than block_size {block_size} "
            f"+ compression_stride {stride}"
        )
    num_before = pl.cdiv(compression_block_size, stride) - 1
    taps = []
    for offset in range(num_before + block_size // stride):
        first = (offset - num_before) * stride
        shared = min(block_size, first + compression_block_size) - max(0, first)
        taps.append(Tap(offset, shared / stride))
    return tuple(taps)


def pad_axis1(array: jax.Array, before: int, after: int, fill: int = 0) -> jax.Array:
    """Pads axis 1; the array itself where there is nothing to pad."""
    padding = [(0, 0)] * array.ndim
    padding[1] = (before, after)
    return jnp.pad(array, padding, constant_values=fill) if before or after else array


def tapped_keys(
    key: jax.Array, taps: tuple[Tap, ...], num_blocks: int, stride: int, block_size: int
) -> jax.Array:
    """Arranges the keys of each tap in the order of blocks: [B, taps, num_blocks, K, H]."""
    per_block = block_size // stride
    num_before, end = len(taps) - per_block, num_blocks * per_block
    key = pad_axis1(key, num_before, end - key.shape[1])
    return jnp.stack([key[:, tap.offset : tap.offset + end : per_block] for tap in taps], axis=1)


def block_bounds(
    positions: jax.Array, visible_from: jax.Array, batch: int, block_size: int, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Returns own block, -1 for padding, and first block of the document, int32 [B, num_rows].

    Args:
      positions: int32 [1, M] of the queries.
      visible_from: int32 [B or 1, M] of them, see `blocks.visible_from`.
      batch: B.
      block_size: Tokens of a block.
      num_rows: Rows to pad to.
    """
    own = jnp.where(visible_from <= positions, positions // block_size, -1)
    first = visible_from // block_size
    shape, missing = (batch, own.shape[1]), num_rows - own.shape[1]
    own, first = (jnp.broadcast_to(x, shape) for x in (own, first))
    return pad_axis1(own, 0, missing, -1), pad_axis1(first, 0, missing, NO_BLOCK)


def column_ranges(num_blocks: int) -> list[int]:
    """Returns the columns of each range of rows: a row is in the first that has its own block."""
    most = num_blocks + -num_blocks % COLUMNS_MULTIPLE
    columns = [COLUMNS_MULTIPLE]
    while columns[-1] < most:
        columns.append(min(2 * columns[-1], most))
    return columns


def map_rows(list_rows: Callable[..., jax.Array], begin: int, end: int, most: int) -> jax.Array:
    """Lists the rows begin .. end - 1, at most `most` of them (but 64) at a time."""
    size = min(end - begin, max(1, most // tiles.ROWS) * tiles.ROWS)
    starts = jnp.arange(begin, end - size + 1, size, dtype=jnp.int32)
    if len(starts) == 1:
        lists = [list_rows(starts[0], num_chunk_rows=size)]
    else:
        chunks = lax.map(functools.partial(list_rows, num_chunk_rows=size), starts)
        chunks = jnp.moveaxis(chunks, 0, 1)
        lists = [chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])]
    rest = (end - begin) % size
    if rest:
        lists.append(list_rows(jnp.int32(end - rest), num_chunk_rows=rest))
    return jnp.concatenate(lists, axis=1)
