"""async_tls_select_blocks on Hopper GPUs: a kernel multiplies, another lists the largest.

A program has 64 blocks as rows of a tile and the query heads of a key head as its columns, so that
the maximum over heads is one along a row. It walks the numbers of the bounds in parts, of which two
are under way, since a whole tile of latents' bounds would have a multiprocessor for itself.

The second kernel compares scores as bits of floats that are not negative. Bounds may be, and
`ordered` maps them in their order to such floats, for half of the precision of float32.
"""

# mypy: disable-error-code="no-untyped-def"

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.async_tls_select_blocks.reference import signed_query
from pallas_kernels.mosaic import largest_columns, tiles
from pallas_kernels.mosaic.decode import COPY_ROWS
from pallas_kernels.mosaic.key_walk import copy_all
from pallas_kernels.mosaic.largest_columns import COLUMNS, KEPT, MAX_COLUMNS, NEVER
from pallas_kernels.mosaic.tiles import ROWS
from pallas_kernels.token_lists import MAX_KEPT_BLOCKS, competing_blocks

PART_WIDTHS = (192, 128, 64)  # numbers of bounds in a part, the widest that divides them
SLOTS = 2  # parts in shared memory
BLOCKS_MULTIPLE = 8  # of the blocks of a cache that the kernel takes
MOST = 1e38  # of a bound; larger ones count as this


# Compiled by itself, so that layers of the same sizes are lowered once.
@functools.partial(jax.jit, static_argnames=("num_blocks", "block_size", "interpret"))
def async_tls_select_blocks(
    query: jax.Array,
    bounds: jax.Array,
    lengths: jax.Array,
    num_blocks: int,
    block_size: int,
    *,
    interpret: Any = None,
) -> jax.Array:
    """See `api.async_tls_select_blocks`; `interpret` is for tests.

    Raises:
      NotImplementedError: The kernels cannot take the call.
    """
    check_supported(query, bounds)
    scores = _scores(query, bounds, lengths, block_size, interpret)
    return largest_columns.largest_columns(
        scores, None, num_columns=bounds.shape[2], size=num_blocks, max_kept=MAX_KEPT_BLOCKS,
        interpret=interpret,
    )  # fmt: skip


def check_supported(query: jax.Array, bounds: jax.Array) -> None:
    """Raises NotImplementedError, naming the value, for what the kernels do not take."""
    if bounds.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"bounds: {bounds.dtype}, the kernel takes bfloat16 and float16")
    num_blocks, width = bounds.shape[2:]
    if width % PART_WIDTHS[-1]:
        raise NotImplementedError(f"bounds: {width} numbers, not a multiple of {PART_WIDTHS[-1]}")
    if not ROWS <= num_blocks <= MAX_COLUMNS or num_blocks % BLOCKS_MULTIPLE:
        raise NotImplementedError(
            f"bounds: {num_blocks} blocks, not a multiple of {BLOCKS_MULTIPLE} in {ROWS} .. "
            f"{MAX_COLUMNS}"
        )
    if (group := query.shape[1] // bounds.shape[1]) > ROWS:
        raise NotImplementedError(f"query: {group} heads of one key head are over {ROWS}")


def ordered(scores: jax.Array) -> jax.Array:
    """Maps float32 in their order to floats from 0 to below `KEPT`; neighbours may meet."""
    bits = lax.bitcast_convert_type(jnp.clip(scores, -MOST, MOST), jnp.int32)
    half = lax.shift_right_logical(jnp.where(bits < 0, ~bits, bits), 1)
    return lax.bitcast_convert_type(jnp.where(bits < 0, half, half + (1 << 30)), jnp.float32)


def _scores(query, bounds, lengths, block_size: int, interpret: Any) -> jax.Array:
    """Scores float32 [B, K, C or more] of blocks as `largest_columns` takes them."""
    batch, num_kv_heads, num_blocks, width = bounds.shape
    dtype = bounds.dtype
    part = next(part for part in PART_WIDTHS if width % part == 0)
    parts, slots = width // part, min(SLOTS, width // part)
    signs = signed_query(query.astype(dtype), num_kv_heads)
    # Rows of padding repeat a head, which does not change the maximum over heads.
    padding = ((0, 0), (0, 0), (0, -signs.shape[2] % COPY_ROWS), (0, 0))
    signs = jnp.pad(signs, padding, mode="edge")
    rows = signs.shape[2]

    def body(q_ref, bounds_ref, lengths_ref, scores_ref, *, q_s, bounds_s, scores_s, q_bar, bars):
        batch_id, tile, head = (lax.axis_index(name) for name in ("batch", "tile", "head"))
        start = jnp.minimum(tile * ROWS, num_blocks - ROWS)
        blocks = pl.ds(start, ROWS)

        def fetch(number):
            columns = pl.ds(number * part, part)
            source = bounds_ref.at[batch_id, head, blocks, columns]
            plgpu.copy_gmem_to_smem(source, bounds_s.at[number % slots], bars.at[number % slots])

        copy_all([(q_ref.at[batch_id, head], q_s)], q_bar)
        for number in range(slots):
            fetch(number)
        plgpu.barrier_wait(q_bar)

        def multiply(sums):
            for number in range(parts):
                slot = number % slots
                plgpu.barrier_wait(bars.at[slot])
                queries = tiles.transposed(q_s.at[:, pl.ds(number * part, part)])
                plgpu.wgmma(sums, bounds_s.at[slot], queries)
                if number + slots < parts:
                    plgpu.wgmma_wait(0)
                    fetch(number + slots)
            return sums[...]

        scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, rows), jnp.float32))
        competes, kept = competing_blocks(
            start + tiles.row_ids(), lengths_ref[batch_id], block_size
        )
        others = jnp.where(kept, KEPT, NEVER)
        scores_s[...] = jnp.where(competes, ordered(scores.max(axis=1)), others)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scores_s, scores_ref.at[batch_id, head, blocks])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (batch, num_kv_heads, num_blocks + -num_blocks % COLUMNS), jnp.float32
        ),
        kernel_name="async_tls_block_scores",
        grid=(batch, pl.cdiv(num_blocks, ROWS), num_kv_heads),
        grid_names=("batch", "tile", "head"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types={
            "q_s": tiles.tiled((rows, width), dtype),
            "bounds_s": tiles.tiled((slots, ROWS, part), dtype),
            "scores_s": plgpu.SMEM((ROWS,), jnp.float32),
            "q_bar": plgpu.Barrier(num_arrivals=1),
            "bars": plgpu.Barrier(num_barriers=slots, num_arrivals=1),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(signs, bounds, lengths.astype(jnp.int32))
