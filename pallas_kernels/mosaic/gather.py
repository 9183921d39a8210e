"""Copies of listed rows and blocks from memory, in a way that Pallas has no words for.

A bulk copy writes at least eight rows of a tile, and costs an arrival of each thread at a barrier.
Here every thread of a warpgroup copies 16 bytes at a time, asynchronously, to where they belong;
what is copied, a list says. Interpret mode knows no such instructions and indexes arrays instead.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import math
from collections.abc import Callable
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels.mosaic import tiles

COPY_BYTES = 16
THREADS = 128  # of a warpgroup


def gather_rows(rows_ref: Any, source_ref: Any, target_ref: Any, *, interpret: Any) -> None:
    """Starts copies of rows to a tile; `commit_gathers` ends a group of them.

    Args:
      rows_ref: int32 [64] in shared memory, rows of the source; a negative one is zeros.
      source_ref: [S, width] in memory, numbers of a row side by side.
      target_ref: [64, width] in shared memory, as from `tiles.tiled`.
      interpret: Parameters of interpret mode.
    """
    if interpret:
        return _index_rows(rows_ref, source_ref, target_ref)
    width, dtype = target_ref.shape[-1], target_ref.dtype
    tiling, swizzle = tiles.transforms(width, dtype)
    of_target = plgpu.RefType((tiling, swizzle))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), of_target))
    def start(_, rows, source, target):
        _start_copies(rows, source, target, swizzle.swizzle)

    start(rows_ref, source_ref, target_ref)


def copy_blocks(
    entries_ref: Any, first: Any, source_ref: Any, target_ref: Any, *, interpret: Any
) -> None:
    """Starts copies of listed blocks, by the only warpgroup of a program.

    Args:
      entries_ref: int32 [L] in memory, numbers of blocks; -1 reads the first.
      first: int32, which entry to begin with; the last one stands for what would come behind.
      source_ref: [S, ...] in memory, without gaps.
      target_ref: [n, rows, ...] in shared memory, for n blocks, each of whole 16 bytes.
      interpret: Parameters of interpret mode.
    """
    if interpret:
        return _index_blocks(entries_ref, first, source_ref, target_ref)
    a_ref, a_scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(a_ref, a_scalar, a_ref, a_ref))
    def start(_, entries, first, source, target):
        _start_block_copies(entries, first, source, target)

    start(entries_ref, first, source_ref, target_ref)


def commit_gathers(*, interpret: Any) -> None:
    """Makes the copies started since the last call a group, which may be empty."""
    if not interpret:
        _emit(nvvm.cp_async_commit_group)


def wait_gathers(groups_left: int, *, interpret: Any) -> None:
    """Waits until at most so many groups, the latest ones, are under way.

    A thread waits for its own copies: `plgpu.commit_smem` shows them to the others.
    """
    if not interpret:
        _emit(nvvm.cp_async_wait_group, groups_left)


def _emit(instruction: Callable[..., Any], *operands: Any) -> None:
    """Puts an instruction without results into the kernel."""

    @plgpu.inline_mgpu()
    def emit(_):
        instruction(*operands)

    emit()


def _start_copies(rows: Any, source: Any, target: Any, swizzle: int) -> None:
    utils.warpgroup_barrier()  # the products of all warps have been waited for
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    source_type, target_type = ir.MemRefType(source.type), ir.MemRefType(target.type)
    element = source_type.element_type
    (row_stride, _), _ = source_type.get_strides_and_offset()
    row_tiles, column_tiles = target_type.shape[-4:-2]
    layout = fragmented_array.tiled_copy_smem_gmem_layout(
        row_tiles, column_tiles, swizzle, utils.bitwidth(element)
    )
    assert layout.vector_length * utils.bitwidth(element) == 8 * COPY_BYTES

    def of_thread(strides):
        """This thread's part of an index, of those that lie `strides` apart in a row and column."""
        tiled = [utils.c(s, i32) for s in layout.tiling.tile_strides(strides)[len(strides) :]]
        lane, warp = layout.lane_indices(), layout.warp_indices()
        return arith.addi(utils.dyn_dot(lane, tiled), utils.dyn_dot(warp, tiled))

    row, column = of_thread((1, 0)), arith.extui(i64, of_thread((0, 1)))
    rows_pointer, source_pointer = utils.memref_ptr(rows), utils.memref_ptr(source)
    source_pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), source_pointer)
    of_row: dict[int, Any] = {}

    def pointer(first_row):
        """Where this thread's part of a row begins, and its bytes; the row by its place."""
        if first_row not in of_row:
            place = utils.getelementptr(rows_pointer, [row], i32)
            place = utils.getelementptr(place, [first_row], i32)
            number = llvm.load(i32, place)
            is_row = arith.cmpi(arith.CmpIPredicate.sge, number, utils.c(0, i32))
            size = arith.select(is_row, utils.c(COPY_BYTES, i32), utils.c(0, i32))
            number = arith.extui(i64, arith.maxsi(number, utils.c(0, i32)))
            offset = arith.addi(arith.muli(number, utils.c(row_stride, i64)), column)
            of_row[first_row] = utils.getelementptr(source_pointer, [offset], element), size
        return of_row[first_row]

    shape = (tiles.ROWS, source_type.shape[1])
    transfers = mgpu.FragmentedArray.transfer_tiled(target, swizzle, layout, shape, optimized=False)
    for _, _, first_place, target_pointer in transfers:
        first_row, first_column = first_place()
        begin, size = pointer(first_row)
        begin = utils.getelementptr(begin, [first_column], element)
        nvvm.cp_async_shared_global(
            target_pointer, begin, COPY_BYTES, nvvm.LoadCacheModifierKind.CG, cp_size=size
        )


def _start_block_copies(entries: Any, first: Any, source: Any, target: Any) -> None:
    i8, i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 32, 64))
    shape, element = ir.MemRefType(target.type).shape, ir.MemRefType(target.type).element_type
    pieces = math.prod(shape[1:]) * utils.bytewidth(element) // COPY_BYTES  # of a block
    last = utils.c(ir.MemRefType(entries.type).shape[0] - 1, i32)
    entries, source, target = (utils.memref_ptr(ref) for ref in (entries, source, target))
    source = llvm.addrspacecast(llvm.PointerType.get(address_space=1), source)
    for begin in range(0, shape[0] * pieces, THREADS):
        piece = arith.addi(utils.thread_idx(), utils.c(begin, i32))
        block = arith.divui(piece, utils.c(pieces, i32))
        place = arith.minui(arith.addi(first.registers.item(), block), last)
        number = llvm.load(i32, utils.getelementptr(entries, [place], i32))
        number = arith.extui(i64, arith.maxsi(number, utils.c(0, i32)))
        of_block = arith.extui(i64, arith.remui(piece, utils.c(pieces, i32)))
        offset = arith.addi(arith.muli(number, utils.c(pieces, i64)), of_block)
        begin_pointer = utils.getelementptr(
            source, [arith.muli(offset, utils.c(COPY_BYTES, i64))], i8
        )
        target_offset = arith.muli(piece, utils.c(COPY_BYTES, i32))
        target_pointer = utils.getelementptr(target, [target_offset], i8)
        is_there = arith.cmpi(arith.CmpIPredicate.ult, piece, utils.c(shape[0] * pieces, i32))
        with utils.when(is_there):
            nvvm.cp_async_shared_global(
                target_pointer, begin_pointer, COPY_BYTES, nvvm.LoadCacheModifierKind.CG
            )


def _index_rows(rows_ref: Any, source_ref: Any, target_ref: Any) -> None:
    rows = rows_ref[...]
    listed = source_ref[...][jnp.maximum(rows, 0)]
    target_ref[...] = jnp.where(rows[:, None] >= 0, listed, 0)


def _index_blocks(entries_ref: Any, first: Any, source_ref: Any, target_ref: Any) -> None:
    count, rows, *rest = target_ref.shape
    last = entries_ref.shape[0] - 1
    numbers = entries_ref[...][jnp.minimum(first + jnp.arange(count), last)]
    target_ref[...] = source_ref[...].reshape(-1, rows, *rest)[jnp.maximum(numbers, 0)]
