"""Mosaic GPU kernel of `select_blocks` that scores blocks.

A tile has the first queries of 64 groups on its rows and blocks on its columns, and loops over the
heads of a key head, importance += weight * exp2(c q . k - lse), so that the sum over heads never
leaves the registers. Compressed blocks that overlap a selection block in the same way ("taps") are
a tile of keys each, so that pooling is a sum over taps. Queries, which every tile of a row reads
anew, bound the speed; hence the warpgroups of a program share them, each with keys of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import tiles
from pallas_kernels.select_blocks.largest import LANES, WARPS

SLOTS = 3  # tiles of queries in shared memory
SHARED_MEMORY_BYTES = 226 * 2**10  # of a program, less barriers
COLUMNS_MULTIPLE = WARPS * 128  # so that a tile of keys is in one warp of `largest`


class Tap(NamedTuple):
    """How compressed block `offset` + j * (blocks per selection block) counts for block j."""

    offset: int
    weight: float


class Tiling(NamedTuple):
    """Tile sizes: warpgroups that share queries, and columns of the tile of each."""

    warpgroups: int
    key_tile: int

    @property
    def columns(self) -> int:
        """Columns of a program."""
        return self.warpgroups * self.key_tile


def tiling(num_taps: int, head_dim: int) -> Tiling:
    """Returns the tile sizes that fit in shared memory.

    Raises:
      NotImplementedError: None do.
    """
    for sizes in (Tiling(2, 128), Tiling(2, 64), Tiling(1, 64)):
        rows = SLOTS * tiles.ROWS + sizes.columns * num_taps
        if rows * head_dim * 2 <= SHARED_MEMORY_BYTES - SLOTS * tiles.ROWS * 4:
            return sizes
    raise NotImplementedError(f"head dim {head_dim} with {num_taps} compressed blocks a block")


def importance(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array,
    own: jax.Array,
    first: jax.Array,
    start: jax.Array,
    *,
    num_columns: int,
    taps: tuple[Tap, ...],
    exponent: float,
    sizes: Tiling,
    interpret: Any,
) -> jax.Array:
    """Scores blocks, if they compete for a place on the list of a row of the tile.

    Args:
      query: [B, rows, queries_per_selection, N, H].
      key: [B, taps, blocks, K, H], blocks a multiple of the columns of a program.
      lse: Base 2, [B, K, G, rows].
      own: int32 [B, rows of this chunk], own blocks; -1 for padding.
      first: int32 [B, rows of this chunk], first blocks of their documents.
      start: First row of this chunk, a multiple of 64.
      num_columns: Blocks to score, a multiple of `COLUMNS_MULTIPLE`.
      taps: Compressed blocks that count for a block.
      exponent: Factor of the scores in base 2.
      sizes: Tile sizes.
      interpret: Parameters of interpret mode, for tests.

    Returns:
      float32 [B, K, rows of this chunk, n, 4, 32], in the order in which `largest` takes them; what
      does not compete is undefined.
    """
    batch, num_kv_heads, group, _ = lse.shape
    head_dim, num_rows = key.shape[-1], own.shape[1]
    warpgroups, key_tile = sizes
    num_words = num_columns // (WARPS * LANES)  # of a warp of `largest`
    by_tile = (batch, num_rows // tiles.ROWS, tiles.ROWS)
    last_own, least_first = own.reshape(by_tile).max(-1), first.reshape(by_tile).min(-1)

    def body(
        q_ref: Any, k_ref: Any, lse_ref: Any, start_ref: Any, last_ref: Any, first_ref: Any,
        scores_ref: Any, *, q_s: Any, k_s: Any, lse_s: Any, q_bar: Any, k_bar: Any, free_bar: Any,
    ) -> None:  # fmt: skip
        batch_id, head = lax.axis_index("batch"), lax.axis_index("head")
        tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")
        row, column = start_ref[0] + tile * tiles.ROWS, lax.axis_index("chunk") * sizes.columns
        competes = (column + 1 < last_ref[batch_id, tile]) & (
            column + sizes.columns - 1 > first_ref[batch_id, tile]
        )
        own_column = column + warpgroup * key_tile

        def fetch(i: jax.Array) -> None:
            slot = lax.rem(i, jnp.int32(SLOTS))
            rows = pl.ds(pl.multiple_of(row, tiles.ROWS), tiles.ROWS)
            plgpu.copy_gmem_to_smem(
                q_ref.at[batch_id, rows, 0, head * group + i], q_s.at[slot], q_bar.at[slot]
            )
            plgpu.copy_gmem_to_smem(
                lse_ref.at[batch_id, head, i, rows], lse_s.at[slot], q_bar.at[slot]
            )

        def refill(i: jax.Array) -> None:
            """Fetches into the slot of head i - 1, which the others have left by now, or almost."""
            plgpu.barrier_wait(free_bar.at[lax.rem(i - 1, jnp.int32(SLOTS))])
            fetch(i - 1 + SLOTS)

        def add_head(i: jax.Array, sums: jax.Array) -> jax.Array:
            slot = lax.rem(i, jnp.int32(SLOTS))
            must_refill = (warpgroup == 0) & (i > 0) & (i - 1 + SLOTS < group)
            pl.when(must_refill)(lambda: refill(i))
            plgpu.barrier_wait(q_bar.at[slot])
            row_lse = tiles.across(plgpu.load(lse_s.at[slot], layout=tiles.BY_ROW), key_tile)
            for number, tap in enumerate(taps):
                keys = tiles.transposed(k_s.at[warpgroup, number])
                scores = tiles.matmul((q_s.at[slot], keys))
                sums = sums + tap.weight * jnp.exp2(scores * exponent - row_lse)
            pl.when(i + SLOTS < group)(lambda: plgpu.barrier_arrive(free_bar.at[slot]))
            return sums

        @pl.when(competes)
        def score() -> None:
            for number in range(len(taps)):
                plgpu.copy_gmem_to_smem(
                    k_ref.at[batch_id, number, pl.ds(own_column, key_tile), head],
                    k_s.at[warpgroup, number],
                    k_bar.at[warpgroup],
                )

            @pl.when(warpgroup == 0)
            def fetch_ahead() -> None:
                for i in range(min(SLOTS, group)):
                    fetch(jnp.int32(i))

            plgpu.barrier_wait(k_bar.at[warpgroup])
            sums = lax.fori_loop(0, group, add_head, tiles.zeros((tiles.ROWS, key_tile)))
            rows = pl.ds(tile * tiles.ROWS, tiles.ROWS)
            word = lax.div(own_column, jnp.int32(LANES))
            warp, word = lax.div(word, jnp.int32(num_words)), lax.rem(word, jnp.int32(num_words))
            for i in range(key_tile // LANES):
                columns = slice(i * LANES, (i + 1) * LANES)
                scores_ref[batch_id, head, rows, word + i, warp] = sums[:, columns]

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (batch, num_kv_heads, num_rows, num_words, WARPS, LANES), jnp.float32
        ),
        kernel_name="select_blocks_scores",
        grid=(batch, num_kv_heads, num_rows // tiles.ROWS, num_columns // sizes.columns),
        grid_names=("batch", "head", "tile", "chunk"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types={
            "q_s": tiles.tiled((SLOTS, tiles.ROWS, head_dim), query.dtype),
            "k_s": tiles.tiled((warpgroups, len(taps), key_tile, head_dim), key.dtype),
            "lse_s": plgpu.SMEM((SLOTS, tiles.ROWS), jnp.float32),
            "q_bar": plgpu.Barrier(num_barriers=SLOTS, num_arrivals=2),
            "k_bar": plgpu.Barrier(num_barriers=warpgroups, num_arrivals=len(taps)),
            "free_bar": plgpu.Barrier(num_barriers=SLOTS, num_arrivals=warpgroups),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(query, key, lse, start[None], last_own, least_first)
