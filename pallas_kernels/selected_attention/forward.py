"""Forward kernel of selected_attention."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic import tiles
from pallas_kernels.mosaic.tiles import ROWS
from pallas_kernels.selected_attention import tile_walk
from pallas_kernels.selected_attention.tile_walk import Problem


def forward(
    problem: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    entries: jax.Array,
    counts: jax.Array,
    query_offset: jax.Array | None,
    *,
    value_columns: slice,
    num_stages: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes output rows and their log-sum-exp.

    Args:
      problem: The static part.
      query: Rows [B * T * K * heads, H], see `Problem`.
      key: [B, S, K, H].
      value: [B, S, K, h], or None: the first columns of the key.
      entries: int32 [B, K, tiles, E] of `lists.union_lists`.
      counts: int32 [B, K, tiles].
      query_offset: int32 [1], position in the row of the first query; None = 0.
      value_columns: Columns of the value to work on, at most 256.
      num_stages: Steps whose keys are in shared memory at a time.

    Returns:
      Output rows of these columns, lse [B, K, T * heads] in base 2; 0 and -inf for a row that sees
      no key.
    """
    batch, num_rows = key.shape[0], problem.num_tokens * problem.heads
    dtype, num_columns = query.dtype, value_columns.stop - value_columns.start
    num_keys = problem.keys_per_step
    arrays = (key,) if value is None else (key, value)

    def selected_attention_forward(  # type: ignore[no-untyped-def]
            query_ref, array_refs, entries_ref, counts_ref, offset_ref, output_ref, lse_ref,
            query_s, array_s, own_output_s, lse_s, entries_s,
            list_barrier, query_barrier, barriers):  # fmt: skip
        walk = tile_walk.TileWalk(problem, offset_ref, entries_s, array_refs, array_s, barriers)
        tile = (walk.batch, walk.head, walk.tile)
        tile_walk.copy_list(entries_ref.at[tile], entries_s, list_barrier)
        walk.load(query_ref, query_s, query_barrier)
        num_steps = tile_walk.steps_of(problem, counts_ref[tile])
        plgpu.barrier_wait(list_barrier)
        walk.start(num_steps)
        plgpu.barrier_wait(query_barrier)

        def step(index, carry, causal):  # type: ignore[no-untyped-def]
            sums, maximum, total = carry
            buffers = walk.wait(index)
            products = tiles.matmul((query_s, tiles.transposed(buffers[0])))
            new_maximum, weights = walk.weights(index, products, maximum, causal)
            rescale = jnp.exp2(maximum - new_maximum)
            total = total * rescale + weights.sum(axis=1)
            sums = sums * tiles.across(rescale, num_columns)
            values = buffers[-1]
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
        output_s = own_output_s[0] if own_output_s else query_s
        columns = (
            output_s.at[:, pl.ds(0, num_columns)] if output_s.shape[1] > num_columns else output_s
        )
        columns[...] = (sums * tiles.across(inverse, num_columns)).astype(dtype)
        plgpu.commit_smem()
        walk.store(output_s, output_ref)
        plgpu.copy_smem_to_gmem(lse_s, lse_ref.at[walk.statistics])
        plgpu.wait_smem_to_gmem(0)

    list_length, width = entries.shape[-1], query.shape[-1]
    return plgpu.kernel(
        selected_attention_forward,
        out_type=(
            jax.ShapeDtypeStruct((query.shape[0], num_columns), dtype),
            jax.ShapeDtypeStruct((batch, problem.num_kv_heads, num_rows), jnp.float32),
        ),
        grid=(batch, problem.num_kv_heads, problem.num_tiles),
        grid_names=("batch", "head", "tile"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=(
            problem.buffer((ROWS, width), dtype),
            tuple(problem.buffer((num_stages, num_keys, x.shape[-1]), dtype) for x in arrays),
            () if num_columns <= width else (tiles.tiled((ROWS, num_columns), dtype),),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((list_length,), jnp.int32),
            plgpu.Barrier(num_arrivals=tile_walk.num_list_copies(list_length)),
            plgpu.Barrier(num_arrivals=ROWS // problem.rows_per_copy(ROWS, query, query)),
            plgpu.Barrier(
                num_barriers=num_stages, num_arrivals=len(arrays) * problem.blocks_per_step
            ),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=problem.interpret,
    )(query, arrays, entries, counts, query_offset)
