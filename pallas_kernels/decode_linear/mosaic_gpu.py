"""decode_linear on Hopper GPUs: one kernel that streams a weight past few rows.

A program owns a few features, and its warpgroups every fourth tile of 64 numbers of the rows with
the 64 rows of the weight that they multiply, so that many copies are under way at any time. Rows
are padded to the 64 of a tile of the tensor cores, which could do several times the work while
memory gives the weight. The root of the mean square is a factor of a row, so it is found on the
way and applied to the sums: (x * scale) W / sqrt(mean(x^2) + epsilon).
"""

# mypy: disable-error-code="no-untyped-def"

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import tiles
from pallas_kernels.mosaic.decode_walk import ALIGNMENT_BYTES, SHARED_MEMORY_BYTES
from pallas_kernels.mosaic.key_walk import copy_all
from pallas_kernels.mosaic.tiles import LOG2E, ROWS

WARPGROUPS = 4
DEPTH = 64  # numbers of a row, and rows of the weight, of a tile
COLUMNS = 32  # features of a program: 64 bytes of a row of the weight, as memory gives them at once
MAX_SLOTS = 8  # tiles in shared memory, of a warpgroup
COPY_ROWS = 8  # of a tile: the least that a copy takes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of a call.

    Attributes:
      rows: Rows of x, padded to what a copy takes.
      parts: Products of a program: gate and up, or one.
      widths: Features of each result.
      slots: Tiles in shared memory, of a warpgroup.
    """

    rows: int
    parts: int
    widths: tuple[int, ...]
    slots: int

    @property
    def features(self) -> int:
        return sum(self.widths)


# Compiled by itself, so that layers of the same sizes are lowered once.
@functools.partial(jax.jit, static_argnames=("epsilon", "gated", "widths", "interpret"))
def decode_linear(
    x: jax.Array,
    weight: jax.Array,
    norm_scale: jax.Array | None,
    residual: jax.Array | None,
    epsilon: float,
    gated: bool,
    widths: tuple[int, ...],
    *,
    interpret: Any = None,
) -> list[jax.Array]:
    """See `api.decode_linear`, with all widths; `interpret` is for tests.

    Raises:
      NotImplementedError: The kernel cannot take the call.
    """
    sizes = _sizes(x, weight, gated, widths)
    padding = (0, sizes.rows - x.shape[0]), (0, 0)
    padded = [None if a is None else jnp.pad(a, padding) for a in (x, residual)]
    scale = None if norm_scale is None else norm_scale.astype(jnp.float32)
    outputs = _multiply(padded[0], weight, scale, padded[1], sizes, epsilon, interpret)
    return [y[: x.shape[0]] for y in outputs]


def _sizes(x: jax.Array, weight: jax.Array, gated: bool, widths: tuple[int, ...]) -> Sizes:
    """Raises NotImplementedError, naming the value, for what the kernel does not take."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x: {x.dtype}, the kernel takes bfloat16 and float16")
    if x.shape[0] > ROWS:
        raise NotImplementedError(f"x: {x.shape[0]} rows are over {ROWS}")
    if x.shape[1] % DEPTH:
        raise NotImplementedError(f"x: {x.shape[1]} numbers, not a multiple of {DEPTH}")
    if any(width % COLUMNS for width in widths):
        raise NotImplementedError(f"weight: {widths} features, not multiples of {COLUMNS}")
    parts = 1 + gated
    rows = x.shape[0] + -x.shape[0] % COPY_ROWS
    sums_bytes = 4 * WARPGROUPS * parts * ROWS * COLUMNS
    last_bytes = ROWS * (2 * DEPTH + 2 * 2 * COLUMNS)  # behind the last rows; residual and result
    room = SHARED_MEMORY_BYTES - ALIGNMENT_BYTES - sums_bytes - last_bytes
    tile_bytes = 2 * DEPTH * (rows + parts * COLUMNS) + 4 * DEPTH
    return Sizes(rows, parts, widths, min(MAX_SLOTS, room // (WARPGROUPS * tile_bytes)))


def _multiply(x, weight, scale, residual, sizes, epsilon, interpret):
    """The results [rows, width] of rows x [rows, D]."""
    dtype, rows, parts, slots = x.dtype, sizes.rows, sizes.parts, sizes.slots
    size, normed, added = x.shape[1], scale is not None, residual is not None

    def body(
        x_ref, w_ref, scale_ref, residual_ref, *y_refs,
        x_s, w_s, scale_s, residual_s, sums_s, squares_s, y_s, full_bar, residual_bar, end_bar,
    ):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        columns = pl.ds(lax.axis_index("columns") * COLUMNS, COLUMNS)
        count = lax.div(size // DEPTH + WARPGROUPS - 1 - warpgroup, jnp.int32(WARPGROUPS))

        def slot_of(tile):
            return warpgroup * slots + lax.rem(tile, jnp.int32(slots))

        def fetch(tile):
            slot, depth = slot_of(tile), pl.ds((warpgroup + tile * WARPGROUPS) * DEPTH, DEPTH)
            copies = [(x_ref.at[:, depth], x_s.at[pl.ds(slot * rows, rows)])]
            for part in range(parts):
                start = lax.axis_index("columns") * COLUMNS + part * sizes.features
                copies.append((w_ref.at[depth, pl.ds(start, COLUMNS)], w_s.at[slot * parts + part]))
            if normed:
                copies.append((scale_ref.at[depth], scale_s.at[slot]))
            copy_all(copies, full_bar.at[slot])

        for tile in range(slots):
            pl.when(tile < count)(functools.partial(fetch, jnp.int32(tile)))
        if added:
            source, target = residual_ref.at[:, columns], residual_s.at[pl.ds(0, rows)]
            pl.when(warpgroup == 0)(lambda: copy_all([(source, target)], residual_bar))

        def step(tile, carry):
            sums, squares = carry
            slot = slot_of(tile)
            plgpu.barrier_wait(full_bar.at[slot])
            # Behind the rows of a slot lie those of others, or nothing: rows that no one asks for.
            left = x_s[pl.ds(slot * rows, ROWS)]
            if normed:
                wide = left.astype(jnp.float32)
                squares = squares + (wide * wide).sum(axis=1)
                by_column = tiles.LAYOUT.reduce(0)
                factor = plgpu.load(scale_s.at[slot], layout=by_column, optimized=False)
                left = (wide * lax.broadcast_in_dim(factor, wide.shape, [1])).astype(dtype)
            products = [[(left, w_s.at[slot * parts + part])] for part in range(parts)]
            sums = tiles.add_matmuls(sums, *products, interpret=interpret)
            pl.when(tile + slots < count)(lambda: fetch(tile + slots))
            return sums, squares

        nothing = tuple(tiles.zeros((ROWS, COLUMNS)) for _ in range(parts)), tiles.zeros((ROWS,))
        sums, squares = lax.fori_loop(0, count, step, nothing)
        for part in range(parts):
            sums_s[warpgroup, part] = sums[part]
        squares_s[warpgroup] = squares
        plgpu.barrier_arrive(end_bar)

        @pl.when(warpgroup == 0)
        def _finish():
            plgpu.barrier_wait(end_bar)
            totals = [_total([sums_s.at[i, p] for i in range(WARPGROUPS)]) for p in range(parts)]
            if normed:
                square = _total([squares_s.at[i] for i in range(WARPGROUPS)], tiles.BY_ROW)
                root = tiles.across(lax.rsqrt(square * (1 / size) + epsilon), COLUMNS)
                totals = [total * root for total in totals]
            totals = [total.astype(dtype).astype(jnp.float32) for total in totals]
            y = totals[0]
            if parts == 2:
                y = y / (1 + jnp.exp2(y * -LOG2E)) * totals[1]
            if added:
                plgpu.barrier_wait(residual_bar)
                y = residual_s[...].astype(jnp.float32) + y
            y_s[...] = y.astype(dtype)
            plgpu.commit_smem()
            start = 0
            for y_ref, width in zip(y_refs, sizes.widths, strict=True):
                place = lax.axis_index("columns") * COLUMNS - start

                @pl.when((place >= 0) & (place < width))
                def _store(y_ref=y_ref, place=place):
                    target = y_ref.at[:, pl.ds(place, COLUMNS)]
                    plgpu.copy_smem_to_gmem(y_s.at[pl.ds(0, rows)], target)

                start += width
            plgpu.wait_smem_to_gmem(0)

    all_slots, tile = WARPGROUPS * slots, (ROWS, COLUMNS)
    scratch: dict[str, Any] = {
        "x_s": tiles.tiled((all_slots * rows + ROWS - rows, DEPTH), dtype),
        "w_s": tiles.tiled((all_slots * parts, DEPTH, COLUMNS), dtype),
        "scale_s": plgpu.SMEM((all_slots, DEPTH), jnp.float32) if normed else None,
        "residual_s": tiles.tiled(tile, dtype) if added else None,
        "sums_s": tiles.tiled((WARPGROUPS, parts, *tile), jnp.float32),
        "squares_s": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "y_s": tiles.tiled(tile, dtype),
        "full_bar": plgpu.Barrier(num_barriers=all_slots, num_arrivals=1 + parts + normed),
        "residual_bar": plgpu.Barrier(num_arrivals=1) if added else None,
        "end_bar": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((rows, width), dtype) for width in sizes.widths],
        kernel_name="decode_linear",
        grid=(sizes.features // COLUMNS,),
        grid_names=("columns",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(x, weight, scale, residual)


def _total(refs, layout=None):
    """Sums equal arrays in shared memory, the first first."""
    arrays = [ref[...] if layout is None else plgpu.load(ref, layout=layout) for ref in refs]
    return functools.reduce(jnp.add, arrays)
