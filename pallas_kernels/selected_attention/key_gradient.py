"""Kernels of selected_attention for the gradients of the key and the value.

With p = exp(s - lse) and ds = p * (do . v - delta): dk = scale * ds^T q and dv = p^T do. An item of
the inverse lists is one block and some of the groups that chose it; it gathers their rows side by
side, 64 a step. No two items add to the same memory, so results do not depend on the order in which
items run.

The tensor cores make results of 64 rows or more. 64 keys of a block are these rows, and weights go
from one product to the next in registers. Fewer keys are columns instead: the sums are transposed,
and the weights pass through shared memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import tiles
from pallas_kernels.mosaic.tiles import ROWS
from pallas_kernels.selected_attention import row_statistics
from pallas_kernels.selected_attention.lists import Cells, InverseLists
from pallas_kernels.selected_attention.tile_walk import TILED_ROWS, Problem


class Features(NamedTuple):
    """Columns of the key, and whether they are the value too."""

    start: int
    size: int
    are_value: bool

    def of(self, ref: Any) -> Any:
        """These columns of a buffer."""
        return ref if self.size == ref.shape[1] else ref.at[:, pl.ds(self.start, self.size)]


class Sums:
    """The sums of an item in registers: one for each part of the key, and one for the value.

    Where the value is a part of the key, their gradients share a sum.
    """

    def __init__(self, problem: Problem, width: int, value_width: int, shares_value: bool):
        self.problem, self.shares_value = problem, shares_value
        # Sums of which the features are the rows: in 64s, undefined beyond the width.
        self.width = width if problem.sums_by_key else pl.cdiv(width, ROWS) * ROWS
        self.features = [Features(0, self.width, False)]
        if shares_value:
            self.features = [Features(0, value_width, True)]
            if width > value_width:
                self.features.append(Features(value_width, self.width - value_width, False))
        self.array_widths = (self.width,) if shares_value else (self.width, value_width)

    def shape(self, width: int) -> tuple[int, int]:
        return (ROWS, width) if self.problem.sums_by_key else (width, self.problem.block_size)

    def zeros(self) -> tuple[jax.Array, ...]:
        widths = [part.size for part in self.features] + list(self.array_widths[1:])
        return tuple(tiles.zeros(self.shape(width)) for width in widths)

    def add(
        self, sums: tuple[jax.Array, ...], query: Any, doutput: Any, weights: Any, dscores: Any
    ) -> tuple[jax.Array, ...]:
        """Adds ds^T q and p^T do of a step, given p and ds with the keys as rows."""

        def product(keys: Any, rows: Any) -> tuple[Any, Any]:
            if self.problem.sums_by_key:
                return keys, rows
            return tiles.transposed(rows), tiles.transposed(keys)

        products = [[product(dscores, part.of(query))] for part in self.features]
        if self.shares_value:
            products[0].append(product(weights, doutput))
        else:
            products.append([product(weights, doutput)])
        return tiles.add_matmuls(sums, *products, interpret=self.problem.interpret)

    def store(self, sums: tuple[jax.Array, ...], refs: Any) -> None:
        """Writes the sums to one array for the key and one for the value."""
        for part, total in zip(self.features, sums, strict=False):
            place = pl.ds(part.start, part.size)
            ref = refs[0].at[:, place] if self.problem.sums_by_key else refs[0].at[place]
            ref[...] = total
        if not self.shares_value:
            refs[1][...] = sums[-1]


class GroupWalk:
    """The walk of an item over its groups."""

    def __init__(
        self,
        problem: Problem,
        query_offset: Any,
        groups: Any,
        items: Any,
        barriers: Any,
        num_stages: int,
    ):
        self.problem, self.query_offset = problem, query_offset
        self.groups, self.barriers = groups, barriers
        self.num_stages, self.num_groups = num_stages, problem.groups_per_tile
        self.item = lax.axis_index("item")
        fields = [items[self.item * 4 + i] for i in range(4)]
        row_head, self.block, self.start, self.length = fields
        self.batch = lax.div(row_head, jnp.int32(problem.num_kv_heads))
        self.head = row_head - self.batch * problem.num_kv_heads
        self.num_steps = lax.div(self.length + (self.num_groups - 1), jnp.int32(self.num_groups))
        shape = (ROWS, ROWS) if problem.sums_by_key else (ROWS, problem.block_size)
        of_row, of_key = (1, 0) if problem.sums_by_key else (0, 1)
        self.row = plgpu.broadcasted_iota(jnp.int32, shape, of_row, layout=tiles.LAYOUT)
        self.key = plgpu.broadcasted_iota(jnp.int32, shape, of_key, layout=tiles.LAYOUT)

    def query_at(self, position: Any) -> Any:
        """The query at a position in the row, counted from the first one and before it too."""
        return position if self.query_offset is None else position - self.query_offset[0]

    def groups_of(self, step: jax.Array) -> list[jax.Array]:
        return [
            self.groups[self.start + step * self.num_groups + i] for i in range(self.num_groups)
        ]

    def fetch(self, rows: Any, statistics: Any, step: jax.Array) -> None:
        """Starts the copies of the rows of a step; arguments are pairs of arrays and buffers."""
        problem, stage = self.problem, lax.rem(step, jnp.int32(self.num_stages))
        size, barrier = problem.rows_per_group, self.barriers.at[stage]
        for i, group in enumerate(self.groups_of(step)):
            token = group * problem.queries_per_selection
            for ref, buffer in rows:
                target = buffer.at[stage, pl.ds(i * size, size)]
                for pair in problem.copies(ref, target, self.batch, self.head, token):
                    plgpu.copy_gmem_to_smem(*pair, barrier)
            for ref, buffer in statistics:
                source, target = ref.at[self.batch, self.head], buffer.at[stage]
                pair = row_statistics.slices(problem, source, target, group, i)
                plgpu.copy_gmem_to_smem(*pair, barrier)

    def visible(self, step: jax.Array, scores: jax.Array, causal: bool) -> jax.Array:
        """-inf for the scores of rows beyond the list and of keys after the query."""
        problem, size = self.problem, self.problem.rows_per_group
        is_listed = self.row < (self.length - step * self.num_groups) * size
        scores = jnp.where(is_listed, scores, -jnp.inf)
        if not causal:
            return scores
        group, *others = self.groups_of(step)
        group = jnp.broadcast_to(group, self.row.shape)
        for i, later in enumerate(others, 1):
            group = jnp.where(self.row >= i * size, later, group)
        token = lax.div(lax.rem(self.row, jnp.int32(size)), jnp.int32(problem.heads))
        token += group * problem.queries_per_selection
        first_key = self.query_at(self.block * problem.block_size)
        return jnp.where(self.key <= token - first_key, scores, -jnp.inf)

    def run(self, step: Any, sums: Any) -> Any:
        """Calls `step(index, sums, causal)` for every step.

        Groups of the block's own tokens come first in its list: only there causality matters.
        """
        problem = self.problem
        own_groups = problem.block_size // problem.queries_per_selection
        first_token = self.groups[self.start] * problem.queries_per_selection
        is_own = first_token < self.query_at((self.block + 1) * problem.block_size)
        causal_steps = jnp.minimum(self.num_steps, pl.cdiv(own_groups, self.num_groups))
        num_causal = jnp.where(is_own, causal_steps, 0)
        sums = lax.fori_loop(0, num_causal, functools.partial(step, causal=True), sums)
        step = functools.partial(step, causal=False)
        return lax.fori_loop(num_causal, self.num_steps, step, sums)


def key_gradient_items(
    problem: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    doutput: jax.Array,
    statistics: tuple[jax.Array, ...],
    inverse: InverseLists,
    query_offset: jax.Array | None,
    *,
    num_stages: int,
) -> tuple[jax.Array, ...]:
    """Computes what each item adds to the gradient of its block of keys (and values).

    Args:
      problem: The static part.
      query: Rows [B * T * K * heads, H], see `Problem`.
      key: [B, S, K, H].
      value: [B, S, K, h], or None: the first h columns of the key.
      doutput: Rows [B * T * K * heads, h].
      statistics: Of `row_statistics.lay_out`.
      inverse: Of `lists.inverse_lists`.
      query_offset: int32 [1], position in the row of the first query; None = 0.
      num_stages: Steps whose rows are in shared memory at a time.

    Returns:
      For the key, and the value if there is one: float32 [items, 64, w]; of blocks of less than 64
      keys [items, W, block size], W the multiple of 64 from w on, undefined beyond w. Undefined for
      an empty item.
    """
    num_items, dtype, size = inverse.items.shape[0] // 4, query.dtype, problem.block_size
    arrays, rows = (key,) if value is None else (key, value), (query, doutput)
    width, value_width = (x.shape[-1] for x in rows)
    totals = Sums(problem, width, value_width, value is None)

    def selected_attention_dkv(  # type: ignore[no-untyped-def]
            row_refs, statistics_refs, array_refs, groups_ref, items_ref, offset_ref,
            *rest):  # fmt: skip
        gradient_refs, scratch = rest[: len(arrays)], rest[len(arrays) :]
        row_s, statistics_s, array_s, product_s, array_barrier, barriers = scratch
        walk = GroupWalk(problem, offset_ref, groups_ref, items_ref, barriers, num_stages)
        fetch = functools.partial(
            walk.fetch,
            list(zip(row_refs, row_s, strict=True)),
            list(zip(statistics_refs, statistics_s, strict=True)),
        )

        def scored(query_w, doutput_w):  # type: ignore[no-untyped-def]
            """q . k and do . v."""
            pairs = [
                (Features(0, width, False).of(query_w), array_s[0]),
                (doutput_w, Features(0, value_width, True).of(array_s[-1])),
            ]
            pairs = [pair[::-1] for pair in pairs] if problem.sums_by_key else pairs
            return tiles.matmuls(*([(left, tiles.transposed(right))] for left, right in pairs))

        def pass_on(*products):  # type: ignore[no-untyped-def]
            """Factors of the next products, the keys as rows."""
            products = [x.astype(dtype) for x in products]
            if problem.sums_by_key:
                return products
            for product, buffer in zip(products, product_s, strict=True):
                tiles.transposed(buffer)[...] = product
            plgpu.commit_smem()
            return product_s

        def step(index, sums, causal):  # type: ignore[no-untyped-def]
            stage = lax.rem(index, jnp.int32(num_stages))
            plgpu.barrier_wait(barriers.at[stage])
            query_w, doutput_w = (buffer.at[stage] for buffer in row_s)
            # To load these, or the groups to fetch, at another place was up to 5% slower.
            lse, delta = row_statistics.load(problem, [x.at[stage] for x in statistics_s])
            products, dweights = scored(query_w, doutput_w)
            scores = walk.visible(index, products * problem.scale2 - lse, causal)
            weights = jnp.exp2(scores)
            dscores = weights * (dweights - delta) * problem.scale
            sums = totals.add(sums, query_w, doutput_w, *pass_on(weights, dscores))
            ahead = index + num_stages
            pl.when(ahead < walk.num_steps)(lambda: fetch(ahead))
            return sums

        @pl.when(walk.num_steps > 0)
        def _() -> None:
            source = pl.ds(walk.block * size, size)
            for ref, buffer in zip(array_refs, array_s, strict=True):
                plgpu.copy_gmem_to_smem(
                    ref.at[walk.batch, source, walk.head], buffer, array_barrier
                )
            for i in range(num_stages):
                pl.when(i < walk.num_steps)(functools.partial(fetch, jnp.int32(i)))
            plgpu.barrier_wait(array_barrier)
            sums = walk.run(step, totals.zeros())
            totals.store(sums, [ref.at[walk.item] for ref in gradient_refs])

    like = (key, arrays[-1])  # factors of one product are tiled alike
    row_buffers = tuple(
        tiles.tiled((num_stages, ROWS, w), dtype, like_width=x.shape[-1])
        for w, x in zip((totals.width, value_width), like, strict=True)
    )
    product_buffers = tuple(
        tiles.tiled((size, ROWS), dtype, like_width=x.shape[-1]) for x in reversed(like)
    )
    copies_of_group = len(statistics) + sum(
        problem.rows_per_group // problem.rows_per_copy(problem.rows_per_group, x, buffer)
        for x, buffer in zip(rows, row_buffers, strict=True)
    )
    return plgpu.kernel(
        selected_attention_dkv,
        out_type=tuple(
            jax.ShapeDtypeStruct((num_items, *totals.shape(w)), jnp.float32)
            for w in totals.array_widths
        ),
        grid=(num_items,),
        grid_names=("item",),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=(
            row_buffers,
            row_statistics.buffers(problem, num_stages, statistics),
            tuple(tiles.tiled((size, x.shape[-1]), dtype) for x in arrays),
            () if problem.sums_by_key else product_buffers,
            plgpu.Barrier(num_arrivals=len(arrays)),
            plgpu.Barrier(
                num_barriers=num_stages, num_arrivals=problem.groups_per_tile * copies_of_group
            ),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=problem.interpret,
    )(rows, statistics, arrays, inverse.groups, inverse.items, query_offset)


def sum_items(
    problem: Problem, parts: jax.Array, inverse: InverseLists, cells: Cells, like: jax.Array
) -> jax.Array:
    """Adds the items of each block in their order: an array like the key or value `like`."""
    (batch_size, _, num_heads, width), size = like.shape, problem.block_size
    wide = parts.shape[2] if problem.sums_by_key else parts.shape[1]
    rows_of_copy = TILED_ROWS if wide > width else size  # some columns: rows tiled together

    def selected_attention_sum(parts_ref, first_ref, output_ref, output_s):  # type: ignore[no-untyped-def]
        batch, head, block = (lax.axis_index(x) for x in ("batch", "head", "block"))
        row_head = batch * num_heads + head

        def add_range(index, sums):  # type: ignore[no-untyped-def]
            cell = cells.first_of(index) + row_head * cells.blocks_of(index) + block
            return lax.fori_loop(first_ref[cell], first_ref[cell + 1], add_item, sums)

        def add_item(item, sums):  # type: ignore[no-untyped-def]
            return sums + plgpu.load(parts_ref.at[item], layout=tiles.LAYOUT, optimized=False)

        first_range = cells.first_range_of(block)
        sums = tiles.zeros(parts.shape[1:])
        sums = lax.fori_loop(first_range, cells.num_ranges, add_range, sums)
        by_key = output_s if problem.sums_by_key else tiles.transposed(output_s)
        by_key[...] = sums.astype(like.dtype)
        plgpu.commit_smem()
        for row in range(0, size, rows_of_copy):
            source = Features(0, width, False).of(output_s.at[pl.ds(row, rows_of_copy)])
            target = pl.ds(block * size + row, rows_of_copy)
            plgpu.copy_smem_to_gmem(source, output_ref.at[batch, target, head])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        selected_attention_sum,
        out_type=jax.ShapeDtypeStruct(like.shape, like.dtype),
        grid=(batch_size, num_heads, cells.num_blocks),
        grid_names=("batch", "head", "block"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=(tiles.tiled((size, wide), like.dtype, like_width=width),),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=problem.interpret,
    )(parts, inverse.first_item)
