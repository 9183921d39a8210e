"""Backward kernels of selected_attention.

With p = exp(s - lse) and ds = p * (do . v - delta): dq = scale * ds k, dk = scale * ds^T q and
dv = p^T do, where delta = do . o - dlse. The query's gradient walks the tiles of the forward pass.
The gradient of keys and values walks the inverse lists: an item is one block and some of the groups
that chose it, whose rows are gathered side by side; no two items add to the same memory, so results
do not depend on the order in which items run.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import tiles
from pallas_kernels.mosaic.tiles import ROWS
from pallas_kernels.selected_attention import forward
from pallas_kernels.selected_attention.forward import KEYS, Problem
from pallas_kernels.selected_attention.lists import Cells, InverseLists

COPY_ROWS = 32  # a copy of one float32 a row lands 128 bytes or more
REPEATS = 4  # or else 32 bytes a row: lse and delta in turn


def statistics(problem: Problem, lse: jax.Array, delta: jax.Array) -> tuple[jax.Array, ...]:
    """Lays out lse (base 2) and delta [B, K, R] so that the rows of one group can be copied."""
    if problem.rows_per_group % COPY_ROWS == 0:
        return lse, delta
    return (jnp.stack([lse, delta] * REPEATS, axis=-1),)


def statistics_buffers(lead: tuple[int, ...], arrays: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    """Returns shared memory for `statistics` of the rows of a tile."""
    if len(arrays) == 2:
        return tuple(plgpu.SMEM((*lead, ROWS), jnp.float32) for _ in arrays)
    return (tiles.tiled((*lead, ROWS, 2 * REPEATS), jnp.float32),)


def load_statistics(buffers: Any) -> tuple[jax.Array, jax.Array]:
    """Reads lse and delta of the rows of a tile."""
    if len(buffers) == 2:
        lse, delta = (plgpu.load(buffer, layout=tiles.BY_ROW) for buffer in buffers)
        return lse, delta
    both = plgpu.load(buffers[0], layout=tiles.LAYOUT)
    is_lse = lax.rem(tiles.column_ids(ROWS, 2 * REPEATS), jnp.int32(2)) == 0
    lse = jnp.where(is_lse, both, 0.0).sum(axis=1) / REPEATS  # exact: a power of two
    delta = jnp.where(is_lse, 0.0, both).sum(axis=1) / REPEATS
    return lse, delta


def query_gradient(
    problem: Problem,
    query: tuple[jax.Array, ...],
    key: tuple[jax.Array, ...],
    value: jax.Array | None,
    doutput: jax.Array,
    row_statistics: tuple[jax.Array, ...],
    entries: jax.Array,
    counts: jax.Array,
    *,
    num_stages: int,
) -> tuple[jax.Array, ...]:
    """Computes the gradient of the query's parts; arguments as `forward.forward`."""
    batch, heads, num_rows, _ = query[0].shape
    dtype = query[0].dtype
    arrays = key if value is None else (*key, value)
    value_index = 0 if value is None else len(key)
    of_rows = (*query, doutput, *row_statistics)

    def body(  # type: ignore[no-untyped-def]
            row_refs, array_refs, entries_ref, counts_ref, gradient_refs,
            row_s, array_s, entries_s, list_barrier, row_barrier, barriers):  # fmt: skip
        walk = forward.TileWalk(problem, entries_s, array_refs, array_s, barriers)
        tile = (walk.batch, walk.head, walk.tile)
        forward.copy_list(entries_ref.at[tile], entries_s, list_barrier)
        for ref, buffer in zip(row_refs, row_s, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[walk.rows], buffer, row_barrier)
        num_steps = forward.steps_of(problem, counts_ref[tile])
        plgpu.barrier_wait(list_barrier)
        walk.start(num_steps)
        plgpu.barrier_wait(row_barrier)
        query_s, doutput_s = row_s[: len(query)], row_s[len(query)]
        lse, delta = load_statistics(row_s[len(query) + 1 :])

        def step(index, gradients, causal):  # type: ignore[no-untyped-def]
            buffers = walk.wait(index)
            pairs = zip(query_s, buffers, strict=False)
            products = tiles.matmul(*((q, tiles.transposed(k)) for q, k in pairs))
            weights = jnp.exp2(walk.scores(index, products, -lse, causal))
            # To wait once for these and for the scores was 3 to 10% slower.
            dweights = tiles.matmul((doutput_s, tiles.transposed(buffers[value_index])))
            dscores = (weights * (dweights - tiles.across(delta, KEYS))).astype(dtype)
            gradients = tuple(
                tiles.add_matmul(sums, dscores, k, interpret=problem.interpret)
                for sums, k in zip(gradients, buffers, strict=False)
            )
            walk.refill(index, num_steps)
            return gradients

        gradients = tuple(tiles.zeros((ROWS, x.shape[-1])) for x in query)
        gradients = walk.run(num_steps, step, gradients)
        for sums, buffer in zip(gradients, query_s, strict=True):
            buffer[...] = (sums * problem.scale).astype(dtype)
        plgpu.commit_smem()
        for buffer, ref in zip(query_s, gradient_refs, strict=True):
            plgpu.copy_smem_to_gmem(buffer, ref.at[walk.rows])
        plgpu.wait_smem_to_gmem(0)

    def body_of_flat(row_refs, array_refs, entries_ref, counts_ref, *rest):  # type: ignore[no-untyped-def]
        body(row_refs, array_refs, entries_ref, counts_ref, rest[: len(query)], *rest[len(query) :])

    list_length = entries.shape[-1]
    return plgpu.kernel(
        body_of_flat,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, dtype) for x in query),
        grid=(batch, heads, num_rows // ROWS),
        grid_names=("batch", "head", "tile"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=(
            (
                *(tiles.tiled((ROWS, x.shape[-1]), dtype) for x in (*query, doutput)),
                *statistics_buffers((), row_statistics),
            ),
            tuple(tiles.tiled((num_stages, KEYS, x.shape[-1]), dtype) for x in arrays),
            plgpu.SMEM((list_length,), jnp.int32),
            plgpu.Barrier(num_arrivals=forward.num_list_copies(list_length)),
            plgpu.Barrier(num_arrivals=len(of_rows)),
            plgpu.Barrier(
                num_barriers=num_stages, num_arrivals=len(arrays) * problem.blocks_per_step
            ),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=problem.interpret,
    )(of_rows, arrays, entries, counts)


def key_gradient_items(
    problem: Problem,
    query: tuple[jax.Array, ...],
    key: tuple[jax.Array, ...],
    value: jax.Array | None,
    doutput: jax.Array,
    row_statistics: tuple[jax.Array, ...],
    inverse: InverseLists,
    *,
    num_stages: int,
) -> tuple[jax.Array, ...]:
    """Computes what each item adds to the gradient of its block of keys (and values).

    Rows are on the long side of the products and the few keys on the short one, so the sums are
    kept transposed. Where the value is a part of the key, both gradients share one sum.

    Args:
      problem: The static part.
      query: Parts [B, K, T * heads, w].
      key: Parts [B, T, K, w].
      value: [B, T, K, h], or None: the first part of the key.
      doutput: [B, K, T * heads, h].
      row_statistics: [B, K, T * heads, STATISTICS].
      inverse: Of `lists.inverse_lists`.
      num_stages: Steps whose rows are in shared memory at a time.

    Returns:
      Float32 [items, W, block size] for each part and the value, W the multiple of 64 from w on;
      undefined beyond w and for an empty item.
    """
    num_items, num_heads = inverse.items.shape[0] // 4, query[0].shape[1]
    dtype, size = query[0].dtype, problem.block_size
    group_rows, num_groups = problem.rows_per_group, problem.groups_per_tile
    arrays = key if value is None else (*key, value)
    value_index = 0 if value is None else len(key)
    of_rows = (*query, doutput, *row_statistics)
    # Groups of the block's own tokens come first in its list: only there causality matters.
    causal_steps = pl.cdiv(size // problem.queries_per_selection, num_groups)
    # The tensor cores take features in 64s. A narrower part lies in a buffer of that width, whose
    # other columns are never written and only reach sums that are dropped; for a column slice to be
    # contiguous, its rows are copied by 8.
    wide = [pl.cdiv(x.shape[-1], tiles.ROWS) * tiles.ROWS for x in (*query, doutput)]
    is_narrow = [i < len(wide) and x.shape[-1] < wide[i] for i, x in enumerate(of_rows)]
    wide_arrays = wide[: len(arrays)]
    copies = sum(group_rows // 8 if narrow else 1 for narrow in is_narrow)

    def body(  # type: ignore[no-untyped-def]
            row_refs, array_refs, groups_ref, items_ref, gradient_refs,
            row_s, array_s, weights_s, dscores_s, narrow_dscores_s,
            array_barrier, barriers):  # fmt: skip
        item = lax.axis_index("item")
        row_head, block, start, length = (items_ref[item * 4 + i] for i in range(4))
        batch = lax.div(row_head, jnp.int32(num_heads))
        head = row_head - batch * num_heads
        num_steps = lax.div(length + (num_groups - 1), jnp.int32(num_groups))

        def fetch(step):  # type: ignore[no-untyped-def]
            stage = lax.rem(step, jnp.int32(num_stages))
            for i in range(num_groups):
                group = groups_ref[start + step * num_groups + i]
                for ref, buffer, narrow in zip(row_refs, row_s, is_narrow, strict=True):
                    size_of_copy = 8 if narrow else group_rows
                    for row in range(0, group_rows, size_of_copy):
                        source = pl.ds(group * group_rows + row, size_of_copy)
                        target = buffer.at[stage, pl.ds(i * group_rows + row, size_of_copy)]
                        if narrow:
                            target = target.at[:, pl.ds(0, ref.shape[-1])]
                        plgpu.copy_gmem_to_smem(
                            ref.at[batch, head, source], target, barriers.at[stage]
                        )

        row = tiles.row_ids()
        place = lax.div(row, jnp.int32(group_rows))  # of a row's group among those of the step
        token = lax.div(row - place * group_rows, jnp.int32(problem.heads))
        column = tiles.column_ids(ROWS, size)

        def step(index, gradients, causal):  # type: ignore[no-untyped-def]
            stage = lax.rem(index, jnp.int32(num_stages))
            plgpu.barrier_wait(barriers.at[stage])
            row_w = [buffer.at[stage] for buffer in row_s]
            query_w, doutput_w = row_w[: len(query)], row_w[len(query)]
            lse, delta = load_statistics(row_w[len(query) + 1 :])
            in_list = place < length - index * num_groups
            keys = [tiles.transposed(x) for x in array_s]
            narrowed = [q.at[:, pl.ds(0, x.shape[-1])] for q, x in zip(query_w, query, strict=True)]
            products, dweights = tiles.matmuls(
                list(zip(narrowed, keys, strict=False)), [(doutput_w, keys[value_index])]
            )
            bias = jnp.where(in_list, -lse, -jnp.inf)
            scores = products * problem.scale2 + tiles.across(bias, size)
            if causal:
                last = jnp.zeros_like(row)
                for i in range(num_groups):
                    first = groups_ref[start + index * num_groups + i]
                    first = first * problem.queries_per_selection - block * size
                    last = jnp.where(place == i, first + token, last)
                scores = jnp.where(column <= tiles.across(last, size), scores, -jnp.inf)
            weights = jnp.exp2(scores)
            dscores = weights * (dweights - tiles.across(delta, size)) * problem.scale
            tiles.transposed(weights_s)[...] = weights.astype(dtype)
            for buffer in (dscores_s, *narrow_dscores_s):
                tiles.transposed(buffer)[...] = dscores.astype(dtype)
            plgpu.commit_smem()
            factors = [
                [(tiles.transposed(q), tiles.transposed((dscores_s, *narrow_dscores_s)[narrow]))]
                for q, narrow in zip(query_w, is_narrow, strict=False)
            ]
            factors += [[]] * (len(array_s) - len(factors))
            factors[value_index] = [
                *factors[value_index],
                (tiles.transposed(doutput_w), tiles.transposed(weights_s)),
            ]
            gradients = tiles.add_matmuls(gradients, *factors, interpret=problem.interpret)
            ahead = index + num_stages
            pl.when(ahead < num_steps)(lambda: fetch(ahead))
            return gradients

        @pl.when(num_steps > 0)
        def _() -> None:
            source = pl.ds(block * size, size)
            for ref, buffer in zip(array_refs, array_s, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[batch, source, head], buffer, array_barrier)
            for i in range(num_stages):
                pl.when(i < num_steps)(functools.partial(fetch, jnp.int32(i)))
            plgpu.barrier_wait(array_barrier)
            is_own = groups_ref[start] * problem.queries_per_selection < (block + 1) * size
            num_causal = jnp.where(is_own, jnp.minimum(num_steps, causal_steps), 0)
            sums = tuple(tiles.zeros((width, size)) for width in wide_arrays)
            sums = lax.fori_loop(0, num_causal, functools.partial(step, causal=True), sums)
            sums = lax.fori_loop(num_causal, num_steps, functools.partial(step, causal=False), sums)
            for gradient, ref in zip(sums, gradient_refs, strict=True):
                ref.at[item][...] = gradient

    def body_of_flat(row_refs, array_refs, groups_ref, items_ref, *rest):  # type: ignore[no-untyped-def]
        body(row_refs, array_refs, groups_ref, items_ref, rest[: len(arrays)], *rest[len(arrays) :])

    return plgpu.kernel(
        body_of_flat,
        out_type=tuple(
            jax.ShapeDtypeStruct((num_items, width, size), jnp.float32) for width in wide_arrays
        ),
        grid=(num_items,),
        grid_names=("item",),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=(
            (
                *(
                    tiles.tiled((num_stages, ROWS, width), dtype, like_width=x.shape[-1])
                    for width, x in zip(wide, of_rows, strict=False)
                ),
                *statistics_buffers((num_stages,), row_statistics),
            ),
            tuple(tiles.tiled((size, x.shape[-1]), dtype) for x in arrays),
            tiles.tiled((size, ROWS), dtype),
            tiles.tiled((size, ROWS), dtype),
            tuple(
                tiles.tiled((size, ROWS), dtype, like_width=x.shape[-1])
                for x, narrow in zip(query, is_narrow, strict=False)
                if narrow
            ),
            plgpu.Barrier(num_arrivals=len(arrays)),
            plgpu.Barrier(num_barriers=num_stages, num_arrivals=copies * num_groups),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=problem.interpret,
    )(of_rows, arrays, inverse.groups, inverse.items)


def sum_items(
    problem: Problem,
    parts: jax.Array,
    inverse: InverseLists,
    cells: Cells,
    shape: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    """Adds the items [items, w, block size] of each block in their order: [B, T, K, w]."""
    num_heads, width, size = shape[2], shape[3], problem.block_size

    def body(parts_ref, first_ref, output_ref, output_s):  # type: ignore[no-untyped-def]
        batch, head, block = (lax.axis_index(x) for x in ("batch", "head", "block"))
        row_head = batch * num_heads + head

        def add_range(index, sums):  # type: ignore[no-untyped-def]
            cell = cells.first_of(index) + row_head * cells.blocks_of(index) + block
            return lax.fori_loop(first_ref[cell], first_ref[cell + 1], add_item, sums)

        def add_item(item, sums):  # type: ignore[no-untyped-def]
            return sums + plgpu.load(parts_ref.at[item], layout=tiles.LAYOUT, optimized=False)

        first_range = lax.div(block, jnp.int32(cells.blocks_per_range))
        sums = tiles.zeros((width, size))
        sums = lax.fori_loop(first_range, cells.num_ranges, add_range, sums)
        tiles.transposed(output_s)[...] = sums.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(output_s, output_ref.at[batch, pl.ds(block * size, size), head])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(shape[0], num_heads, cells.num_blocks),
        grid_names=("batch", "head", "block"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=(tiles.tiled((size, width), dtype),),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=problem.interpret,
    )(parts, inverse.first_item)
