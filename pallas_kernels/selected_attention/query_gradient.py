"""Kernel of selected_attention for the gradient of the query."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic import tiles
from pallas_kernels.mosaic.tiles import ROWS
from pallas_kernels.selected_attention import tile_walk
from pallas_kernels.selected_attention.tile_walk import Problem


def query_gradient(
    problem: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    doutput: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    entries: jax.Array,
    counts: jax.Array,
    query_offset: jax.Array | None,
    *,
    num_stages: int,
) -> jax.Array:
    """Computes dq = scale * ds k, with p = exp(s - lse) and ds = p * (do . v - delta).

    Args:
      problem: The static part.
      query: Rows [B * T * K * heads, H], see `Problem`.
      key: [B, S, K, H].
      value: [B, S, K, h], or None: the first h columns of the key.
      doutput: Rows [B * T * K * heads, h].
      lse: [B, K, T * heads] in base 2.
      delta: [B, K, T * heads].
      entries: int32 [B, K, tiles, E] of `lists.union_lists`.
      counts: int32 [B, K, tiles].
      query_offset: int32 [1], position in the row of the first query; None = 0.
      num_stages: Steps whose keys are in shared memory at a time.

    Returns:
      Rows like query.
    """
    dtype, (width, num_columns) = query.dtype, (x.shape[-1] for x in (query, doutput))
    num_keys = problem.keys_per_step
    arrays = (key,) if value is None else (key, value)
    row_copies = sum(ROWS // problem.rows_per_copy(ROWS, x, x) for x in (query, doutput))

    def selected_attention_dq(  # type: ignore[no-untyped-def]
            query_ref, doutput_ref, statistics_refs, array_refs, entries_ref, counts_ref,
            offset_ref, gradient_ref, query_s, doutput_s, statistics_s, array_s, entries_s,
            list_barrier, row_barrier, barriers):  # fmt: skip
        walk = tile_walk.TileWalk(problem, offset_ref, entries_s, array_refs, array_s, barriers)
        tile = (walk.batch, walk.head, walk.tile)
        tile_walk.copy_list(entries_ref.at[tile], entries_s, list_barrier)
        walk.load(query_ref, query_s, row_barrier)
        walk.load(doutput_ref, doutput_s, row_barrier)
        for ref, buffer in zip(statistics_refs, statistics_s, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[walk.statistics], buffer, row_barrier)
        num_steps = tile_walk.steps_of(problem, counts_ref[tile])
        plgpu.barrier_wait(list_barrier)
        walk.start(num_steps)
        plgpu.barrier_wait(row_barrier)
        lse, delta = (plgpu.load(buffer, layout=tiles.BY_ROW) for buffer in statistics_s)

        def step(index, gradient, causal):  # type: ignore[no-untyped-def]
            buffers = walk.wait(index)
            keys, values = buffers[0], buffers[-1]
            if num_columns < values.shape[1]:
                values = values.at[:, pl.ds(0, num_columns)]
            products = tiles.matmul((query_s, tiles.transposed(keys)))
            weights = jnp.exp2(walk.scores(index, products, -lse, causal))
            # To wait once for these and for the scores was 3 to 10% slower.
            dweights = tiles.matmul((doutput_s, tiles.transposed(values)))
            dscores = (weights * (dweights - tiles.across(delta, num_keys))).astype(dtype)
            products = [[(dscores, part)] for part in tiles.column_parts(keys)]
            gradient = tiles.add_matmuls(gradient, *products, interpret=problem.interpret)
            walk.refill(index, num_steps)
            return gradient

        parts = tiles.column_parts(query_s)
        gradient = walk.run(num_steps, step, tuple(tiles.zeros(part.shape) for part in parts))
        for part, total in zip(parts, gradient, strict=True):
            part[...] = (total * problem.scale).astype(dtype)
        plgpu.commit_smem()
        walk.store(query_s, gradient_ref)
        plgpu.wait_smem_to_gmem(0)

    list_length = entries.shape[-1]
    return plgpu.kernel(
        selected_attention_dq,
        out_type=jax.ShapeDtypeStruct(query.shape, dtype),
        grid=(key.shape[0], problem.num_kv_heads, problem.num_tiles),
        grid_names=("batch", "head", "tile"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=(
            problem.buffer((ROWS, width), dtype),
            problem.buffer((ROWS, num_columns), dtype, arrays[-1].shape[-1]),
            tuple(plgpu.SMEM((ROWS,), jnp.float32) for _ in range(2)),
            tuple(problem.buffer((num_stages, num_keys, x.shape[-1]), dtype) for x in arrays),
            plgpu.SMEM((list_length,), jnp.int32),
            plgpu.Barrier(num_arrivals=tile_walk.num_list_copies(list_length)),
            plgpu.Barrier(num_arrivals=row_copies + 2),
            plgpu.Barrier(
                num_barriers=num_stages, num_arrivals=len(arrays) * problem.blocks_per_step
            ),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=problem.interpret,
    )(query, doutput, (lse, delta), arrays, entries, counts, query_offset)
