"""Forward kernel of selected_attention.

A warpgroup owns a tile of 64 rows (query tokens times heads of one key head) and walks the union of
the lists of its groups, 64 keys a step: one block of 64 or four of 16, gathered side by side by the
copy engine while earlier keys are worked on. A row whose group did not choose a block gets -inf for
its scores. Entries ascend, so only the last steps can hold keys after a query.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import tiles
from pallas_kernels.mosaic.tiles import ROWS
from pallas_kernels.selected_attention.lists import MEMBER_BITS

KEYS = 64  # keys of a step
COPY_LIMIT = 256  # numbers along an axis that one copy takes


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static about a call.

    Rows are query tokens times heads: row = token * heads + head. Query and key come in parts, one
    for the latent and one for RoPE where they share a buffer with the value, else one.
    """

    block_size: int
    queries_per_selection: int
    heads: int  # query heads of a key head, padded
    scale: float
    interpret: Any = None

    @property
    def rows_per_group(self) -> int:
        return self.queries_per_selection * self.heads

    @property
    def groups_per_tile(self) -> int:
        return ROWS // self.rows_per_group

    @property
    def tokens_per_tile(self) -> int:
        return ROWS // self.heads

    @property
    def blocks_per_step(self) -> int:
        return KEYS // self.block_size

    @property
    def causal_steps(self) -> int:
        """The last steps of a tile, which may hold blocks that the tile's own tokens lie in."""
        return 1 if self.tokens_per_tile <= self.block_size else 2

    @property
    def scale2(self) -> float:
        return self.scale * tiles.LOG2E


class TileWalk:
    """What the forward kernel and the one for the query's gradient share: the walk of a tile."""

    def __init__(self, problem: Problem, entries: Any, arrays: Any, buffers: Any, barriers: Any):
        self.problem, self.entries, self.arrays = problem, entries, arrays
        self.buffers, self.barriers = buffers, barriers
        self.num_stages = buffers[0].shape[0]
        self.batch, self.head, self.tile = (lax.axis_index(x) for x in ("batch", "head", "tile"))
        row = tiles.row_ids()
        self.group = lax.div(row, jnp.int32(problem.rows_per_group))
        first = self.tile * problem.tokens_per_tile
        self.token = first + lax.div(row, jnp.int32(problem.heads))
        self.column = tiles.column_ids(ROWS, problem.block_size)

    @property
    def rows(self) -> Any:
        return self.batch, self.head, pl.ds(self.tile * ROWS, ROWS)

    def fetch(self, step: jax.Array) -> None:
        """Starts the copies of the keys (and values) of a step into their stage."""
        problem, stage = self.problem, lax.rem(step, jnp.int32(self.num_stages))
        for i in range(problem.blocks_per_step):
            block = self.entries[step * problem.blocks_per_step + i] >> MEMBER_BITS
            source = pl.ds(block * problem.block_size, problem.block_size)
            target = pl.ds(i * problem.block_size, problem.block_size)
            for array, buffer in zip(self.arrays, self.buffers, strict=True):
                plgpu.copy_gmem_to_smem(
                    array.at[self.batch, source, self.head],
                    buffer.at[stage, target],
                    self.barriers.at[stage],
                )

    def start(self, num_steps: jax.Array) -> None:
        for i in range(self.num_stages):
            pl.when(i < num_steps)(functools.partial(self.fetch, jnp.int32(i)))

    def wait(self, step: jax.Array) -> list[Any]:
        """Waits for the keys (and values) of a step and returns their buffers."""
        stage = lax.rem(step, jnp.int32(self.num_stages))
        plgpu.barrier_wait(self.barriers.at[stage])
        return [buffer.at[stage] for buffer in self.buffers]

    def refill(self, step: jax.Array, num_steps: jax.Array) -> None:
        ahead = step + self.num_stages
        pl.when(ahead < num_steps)(lambda: self.fetch(ahead))

    def scores(
        self, step: jax.Array, products: jax.Array, addend: jax.Array, causal: bool
    ) -> jax.Array:
        """Scores in base 2, plus a number a row; -inf for the keys that the row does not see."""
        problem, size, pieces = self.problem, self.problem.block_size, []
        for i in range(problem.blocks_per_step):
            entry = self.entries[step * problem.blocks_per_step + i]
            bias = jnp.where((entry >> self.group) & 1 == 1, addend, -jnp.inf)
            piece = products[:, i * size : (i + 1) * size] * problem.scale2
            piece += tiles.across(bias, size)
            if causal:
                last = self.token - (entry >> MEMBER_BITS) * size
                piece = jnp.where(self.column <= tiles.across(last, size), piece, -jnp.inf)
            pieces.append(piece)
        return jnp.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]

    def weights(
        self, step: jax.Array, products: jax.Array, maximum: jax.Array, causal: bool
    ) -> tuple[jax.Array, jax.Array]:
        """The maximum of the scores in base 2 so far, and exp2(scores - maximum)."""
        scale2 = self.problem.scale2
        if self.problem.blocks_per_step > 1 or scale2 <= 0:
            scores = self.scores(step, products, jnp.zeros_like(maximum), causal)
            maximum = jnp.maximum(maximum, scores.max(axis=1))
            return maximum, jnp.exp2(scores - tiles.across(maximum, KEYS))
        # One block: all of a row counts or nothing, so numbers of the row do the masking.
        entry = self.entries[step]
        if causal:
            last = self.token - (entry >> MEMBER_BITS) * KEYS
            products = jnp.where(self.column <= tiles.across(last, KEYS), products, -jnp.inf)
        is_member = (entry >> self.group) & 1 == 1
        largest = jnp.where(is_member, products.max(axis=1) * scale2, -jnp.inf)
        maximum = jnp.maximum(maximum, largest)
        offset = jnp.where(is_member, maximum, jnp.inf)
        return maximum, jnp.exp2(products * scale2 - tiles.across(offset, KEYS))

    def run(self, num_steps: jax.Array, step: Any, carry: Any) -> Any:
        """Calls `step(index, carry, causal)` for every step."""
        first_causal = jnp.maximum(num_steps - self.problem.causal_steps, 0)
        carry = lax.fori_loop(0, first_causal, functools.partial(step, causal=False), carry)
        return lax.fori_loop(first_causal, num_steps, functools.partial(step, causal=True), carry)


def copy_list(entries_ref: Any, entries_buffer: Any, barrier: Any) -> None:
    """Starts the copies of a list into shared memory."""
    for start in range(0, entries_ref.shape[0], COPY_LIMIT):
        piece = pl.ds(start, min(COPY_LIMIT, entries_ref.shape[0] - start))
        plgpu.copy_gmem_to_smem(entries_ref.at[piece], entries_buffer.at[piece], barrier)


def num_list_copies(length: int) -> int:
    return -(-length // COPY_LIMIT)


def steps_of(problem: Problem, count: jax.Array) -> jax.Array:
    """Steps for so many entries."""
    return lax.div(count + (problem.blocks_per_step - 1), jnp.int32(problem.blocks_per_step))


def forward(
    problem: Problem,
    query: tuple[jax.Array, ...],
    key: tuple[jax.Array, ...],
    value: jax.Array | None,
    entries: jax.Array,
    counts: jax.Array,
    *,
    value_columns: slice,
    num_stages: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes output rows and their log-sum-exp.

    Args:
      problem: The static part.
      query: Parts [B, K, T * heads, w].
      key: Parts [B, T, K, w].
      value: [B, T, K, h], or None: the first part of the key.
      entries: int32 [B, K, tiles, E] of `lists.union_lists`.
      counts: int32 [B, K, tiles].
      value_columns: Columns of the value to work on, at most 256.
      num_stages: Steps whose keys are in shared memory at a time.

    Returns:
      Output [B, K, T * heads, columns], lse [B, K, T * heads] in base 2; 0 and -inf for a row that
      sees no key.
    """
    batch, heads, num_rows, width = query[0].shape
    dtype, num_columns = query[0].dtype, value_columns.stop - value_columns.start
    arrays = key if value is None else (*key, value)
    value_index = 0 if value is None else len(key)

    def body(  # type: ignore[no-untyped-def]
            query_ref, array_refs, entries_ref, counts_ref, output_ref, lse_ref,
            query_s, array_s, own_output_s, lse_s, entries_s,
            list_barrier, query_barrier, barriers):  # fmt: skip
        walk = TileWalk(problem, entries_s, array_refs, array_s, barriers)
        tile = (walk.batch, walk.head, walk.tile)
        copy_list(entries_ref.at[tile], entries_s, list_barrier)
        for ref, buffer in zip(query_ref, query_s, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[walk.rows], buffer, query_barrier)
        num_steps = steps_of(problem, counts_ref[tile])
        plgpu.barrier_wait(list_barrier)
        walk.start(num_steps)
        plgpu.barrier_wait(query_barrier)

        def step(index, carry, causal):  # type: ignore[no-untyped-def]
            sums, maximum, total = carry
            buffers = walk.wait(index)
            pairs = zip(query_s, buffers, strict=False)
            products = tiles.matmul(*((q, tiles.transposed(k)) for q, k in pairs))
            new_maximum, weights = walk.weights(index, products, maximum, causal)
            rescale = jnp.exp2(maximum - new_maximum)
            total = total * rescale + weights.sum(axis=1)
            sums = sums * tiles.across(rescale, num_columns)
            values = buffers[value_index]
            if num_columns < values.shape[1]:
                values = values.at[:, pl.ds(value_columns.start, num_columns)]
            sums = tiles.add_matmul(
                sums, weights.astype(dtype), values, interpret=problem.interpret
            )
            walk.refill(index, num_steps)
            return sums, new_maximum, total

        nothing = tiles.zeros((ROWS,))
        carry = tiles.zeros((ROWS, num_columns)), nothing + tiles.NO_MAXIMUM, nothing
        sums, maximum, total = walk.run(num_steps, step, carry)
        inverse = 1 / jnp.where(total > 0, total, 1)
        lse_s[...] = jnp.where(total > 0, maximum + jnp.log2(total), -jnp.inf)
        output_s = own_output_s[0] if own_output_s else query_s[0]
        output_s[...] = (sums * tiles.across(inverse, num_columns)).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(output_s, output_ref.at[walk.rows])
        plgpu.copy_smem_to_gmem(lse_s, lse_ref.at[walk.rows])
        plgpu.wait_smem_to_gmem(0)

    list_length = entries.shape[-1]
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, heads, num_rows, num_columns), dtype),
            jax.ShapeDtypeStruct((batch, heads, num_rows), jnp.float32),
        ),
        grid=(batch, heads, num_rows // ROWS),
        grid_names=("batch", "head", "tile"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=(
            tuple(tiles.tiled((ROWS, x.shape[-1]), dtype) for x in query),
            tuple(tiles.tiled((num_stages, KEYS, x.shape[-1]), dtype) for x in arrays),
            () if num_columns == width else (tiles.tiled((ROWS, num_columns), dtype),),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((list_length,), jnp.int32),
            plgpu.Barrier(num_arrivals=num_list_copies(list_length)),
            plgpu.Barrier(num_arrivals=len(query)),
            plgpu.Barrier(
                num_barriers=num_stages, num_arrivals=len(arrays) * problem.blocks_per_step
            ),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=problem.interpret,
    )(query, arrays, entries, counts)
