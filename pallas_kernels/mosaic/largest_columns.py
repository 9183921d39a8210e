"""Mosaic GPU kernel that lists the columns with the largest scores of a row, ascending.

A warpgroup holds a row in registers and bisects for the value of the last place on the list, as
`select_blocks.largest` does. The votes of a warp then count the chosen columns before each, which
says where on the list it stands, and every thread writes its own there. Pallas has no words for
votes; interpret mode sorts instead.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels.select_blocks.largest import LANES, SCORES, WARPS, count_by_warp, search

KEPT = float(jnp.finfo(jnp.float32).max)  # the score of a column that is listed in any case
NEVER = -1.0  # the score of one that is not
COLUMNS = 4 * WARPS * LANES  # what the columns of a row in memory are a multiple of
MAX_COLUMNS = 16384  # of a row: 128 registers of a thread
THREADS = WARPS * LANES


def largest_columns(
    scores: jax.Array,
    places: jax.Array | None,
    *,
    num_columns: int,
    size: int,
    max_kept: int,
    interpret: Any,
    block_size: int = 1,
) -> jax.Array:
    """Lists the columns that are kept and the `size` best others.

    Args:
      scores: float32 [B, K, C], C a multiple of `COLUMNS`: at least 0 where a column competes,
        `KEPT` or `NEVER` elsewhere.
      places: int32 [B, K, L], what columns stand for: entry c of the list is
        places[c // block_size] * block_size + c % block_size; None for the columns themselves.
      num_columns: Columns that there are; behind them scores may be anything.
      size: Places on the list besides those that are kept.
      max_kept: The most columns that are kept.
      interpret: Parameters of interpret mode, for tests.
      block_size: Columns of an entry of places.

    Returns:
      int32 [B, K, size + max_kept], -1 at the end; in the order of columns, of equal scores the
      first ones.
    """
    batch, num_kv_heads, width = scores.shape
    shape = (width // (WARPS * LANES), WARPS, LANES)
    by_warp = scores.reshape(batch, num_kv_heads, WARPS, shape[0], LANES)
    length = size + max_kept

    def body(scores_ref, places_ref, lists_ref, *, totals_s) -> None:
        place = tuple(jax.lax.axis_index(name) for name in ("batch", "head"))
        word, warp, lane = (
            plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=SCORES) for axis in range(3)
        )
        column = (warp * shape[0] + word) * LANES + lane
        row = scores_ref.at[place].transpose((1, 0, 2))
        values = plgpu.load(row, layout=SCORES, optimized=False)
        values = jnp.where(column < num_columns, values, NEVER)
        kept = values == KEPT
        values = jnp.where(kept, NEVER, values)
        competing = count_by_warp(values >= 0).sum()
        least, last_tie = search(values, column, competing, jnp.int32(size))
        chosen = (values > least) | ((values == least) & (column <= last_tie)) | kept
        of_row = None if places_ref is None else places_ref.at[place]
        list_ref, chosen = lists_ref.at[place], chosen.astype(jnp.int32)
        _write_list(chosen, of_row, block_size, list_ref, totals_s, interpret)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, num_kv_heads, length), jnp.int32),
        kernel_name="async_tls_largest",
        grid=(batch, num_kv_heads),
        grid_names=("batch", "head"),
        num_threads=1,  # reductions over warps of several warpgroups would share their scratch
        thread_name="warpgroup",
        scratch_types={"totals_s": plgpu.SMEM((WARPS,), jnp.int32)},
        interpret=interpret,
    )(by_warp, places)


def _write_list(chosen, places_ref, block_size: int, list_ref, totals_s, interpret) -> None:
    if interpret:
        return _write_sorted(chosen, places_ref, block_size, list_ref)
    refs = [plgpu.RefType()] * (2 if places_ref is None else 3)

    @plgpu.inline_mgpu(arg_types=(SCORES, *refs))
    def write(_, chosen, listed, totals, places=None):
        _write_votes(chosen, listed, totals, places, block_size)

    write(chosen, list_ref, totals_s, *([] if places_ref is None else [places_ref]))


def _write_votes(chosen, listed, totals, places, block_size: int) -> None:
    """Writes the list: in each thread, a vote for each word tells the rank of its column."""
    i32 = ir.IntegerType.get_signless(32)
    registers = [llvm.extractelement(x, utils.c(0, i32)) for x in chosen.registers.flatten()]
    length = ir.MemRefType(listed.type).shape[0]
    lane, warp = (f(utils.thread_idx(), utils.c(LANES, i32)) for f in (arith.remui, arith.divui))
    everyone = utils.c(0xFFFFFFFF, i32)
    before = arith.subi(arith.shli(utils.c(1, i32), lane), utils.c(1, i32))

    def vote(register):
        mine = arith.cmpi(arith.CmpIPredicate.ne, register, utils.c(0, i32))
        return mine, nvvm.vote_sync(everyone, mine, "ballot")

    def add_count(count, bits):
        return arith.addi(count, llvm.intr_ctpop(bits))

    total = utils.c(0, i32)
    for register in registers:
        total = add_count(total, vote(register)[1])
    totals = utils.memref_ptr(totals)
    llvm.store(total, utils.getelementptr(totals, [warp], i32))  # the same in all its lanes
    utils.warpgroup_barrier()
    rank = end = utils.c(0, i32)
    for other in range(WARPS):
        count = llvm.load(i32, utils.getelementptr(totals, [other], i32))
        is_before = arith.cmpi(arith.CmpIPredicate.ugt, warp, utils.c(other, i32))
        rank = arith.addi(rank, arith.select(is_before, count, utils.c(0, i32)))
        end = arith.addi(end, count)
    target = utils.memref_ptr(listed)
    for start in range(0, length, THREADS):
        place = arith.addi(utils.thread_idx(), utils.c(start, i32))
        is_empty = arith.andi(
            arith.cmpi(arith.CmpIPredicate.uge, place, end),
            arith.cmpi(arith.CmpIPredicate.ult, place, utils.c(length, i32)),
        )
        with utils.when(is_empty):
            llvm.store(utils.c(-1, i32), utils.getelementptr(target, [place], i32))
    first_word = arith.muli(warp, utils.c(len(registers), i32))
    for i, register in enumerate(registers):
        mine, bits = vote(register)
        place = add_count(rank, arith.andi(bits, before))
        fits = arith.cmpi(arith.CmpIPredicate.ult, place, utils.c(length, i32))
        word = arith.addi(first_word, utils.c(i, i32))
        value = _listed(word, lane, places, block_size)  # here, so that loads do not wait for votes
        with utils.when(arith.andi(mine, fits)):
            llvm.store(value, utils.getelementptr(target, [place], i32))
        rank = add_count(rank, bits)


def _listed(word, lane, places, block_size: int):
    """What a lane's column of a word stands for."""
    i32 = ir.IntegerType.get_signless(32)
    column = arith.addi(arith.muli(word, utils.c(LANES, i32)), lane)
    if places is None:
        return column
    size = utils.c(block_size, i32)
    last = utils.c(ir.MemRefType(places.type).shape[0] - 1, i32)
    number = arith.minui(arith.divui(column, size), last)
    pointer = utils.getelementptr(utils.memref_ptr(places), [number], i32)
    first = arith.muli(llvm.load(i32, pointer), size)
    return arith.addi(first, arith.remui(column, size))


def _write_sorted(chosen, places_ref, block_size: int, list_ref) -> None:
    flat = chosen.swapaxes(0, 1).reshape(-1)
    number = jax.lax.iota(jnp.int32, flat.size)
    column = jnp.sort(jnp.where(flat > 0, number, flat.size))[: list_ref.shape[0]]
    listed = column
    if places_ref is not None:
        last = places_ref.shape[0] - 1
        first = places_ref[...][jnp.minimum(column // block_size, last)]
        listed = first * block_size + column % block_size
    list_ref[...] = jnp.where(column < flat.size, listed, -1)
