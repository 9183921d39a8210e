"""How lse and delta of a group's rows come into shared memory beside its queries.

A copy lands at a multiple of 128 bytes, which is more than a small group has of either. Where the
rows are columns of the scores, one copy brings both for a group; where they are rows, as many
copies bring one each, or else each row has 32 bytes with the two in turn.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import tiles
from pallas_kernels.mosaic.tiles import ROWS
from pallas_kernels.selected_attention.tile_walk import Problem

COPY_NUMBERS = 32  # float32 numbers of the smallest copy
REPEATS = 4  # of lse and delta in 32 bytes


def numbers_per_group(problem: Problem) -> int:
    """Numbers of a group where one copy brings both: its lse, its delta, padding."""
    return max(COPY_NUMBERS, 2 * problem.rows_per_group)


def lay_out(problem: Problem, lse: jax.Array, delta: jax.Array) -> tuple[jax.Array, ...]:
    """Lays out lse (base 2) and delta [B, K, T * heads] so that those of a group can be copied."""
    if problem.sums_by_key:
        pair = [x.reshape(*x.shape[:2], -1, problem.rows_per_group) for x in (lse, delta)]
        both = jnp.concatenate(pair, axis=-1)
        padding = numbers_per_group(problem) - both.shape[-1]
        return (jnp.pad(both, ((0, 0), (0, 0), (0, 0), (0, padding))),)
    if problem.rows_per_group % COPY_NUMBERS == 0:
        return lse, delta
    return (jnp.stack([lse, delta] * REPEATS, axis=-1),)


def buffers(problem: Problem, num_stages: int, arrays: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    """Returns shared memory for the rows of so many steps."""
    if problem.sums_by_key:
        size = problem.groups_per_tile * numbers_per_group(problem)
        return (plgpu.SMEM((num_stages, size), jnp.float32),)
    if len(arrays) == 2:
        return tuple(plgpu.SMEM((num_stages, ROWS), jnp.float32) for _ in arrays)
    return (tiles.tiled((num_stages, ROWS, 2 * REPEATS), jnp.float32),)


def slices(problem: Problem, ref: Any, buffer: Any, group: Any, place: int) -> tuple[Any, Any]:
    """One group's numbers in memory [B's row and head taken], and in the buffer of a step.

    Args:
      problem: The static part.
      ref: Of `lay_out`, for one row of the batch and one key head.
      buffer: Of `buffers`, for one step.
      group: The group.
      place: Its place among the groups of the step.
    """
    if problem.sums_by_key:
        size = numbers_per_group(problem)
        return ref.at[group], buffer.at[pl.ds(place * size, size)]
    size = problem.rows_per_group
    return ref.at[pl.ds(group * size, size)], buffer.at[pl.ds(place * size, size)]


def load(problem: Problem, step_buffers: Any) -> tuple[jax.Array, jax.Array]:
    """Reads lse and delta of the rows of a step, repeated along the keys of a tile of scores."""
    if problem.sums_by_key:
        return _load_along_columns(problem, step_buffers[0])
    if len(step_buffers) == 2:
        lse, delta = (plgpu.load(buffer, layout=tiles.BY_ROW) for buffer in step_buffers)
    else:
        both = plgpu.load(step_buffers[0], layout=tiles.LAYOUT)
        is_lse = lax.rem(tiles.column_ids(ROWS, 2 * REPEATS), jnp.int32(2)) == 0
        lse = jnp.where(is_lse, both, 0.0).sum(axis=1) / REPEATS  # exact: a power of two
        delta = jnp.where(is_lse, 0.0, both).sum(axis=1) / REPEATS
    return tiles.across(lse, problem.block_size), tiles.across(delta, problem.block_size)


def _load_along_columns(problem: Problem, buffer: Any) -> tuple[jax.Array, jax.Array]:
    size, rows = numbers_per_group(problem), problem.rows_per_group
    vector = plgpu.load(buffer, layout=tiles.LAYOUT.reduce(0))
    tile = lax.broadcast_in_dim(vector, (ROWS, vector.shape[0]), [1])
    starts = range(0, vector.shape[0], size)
    pieces = [
        [tile[:, i : i + rows] for i in starts],
        [tile[:, i + rows : i + 2 * rows] for i in starts],
    ]
    lse, delta = (x[0] if len(x) == 1 else jnp.concatenate(x, axis=1) for x in pieces)
    return lse, delta
