"""decode_select_blocks on Hopper GPUs: a kernel sums attention over heads, another takes the top.

Which rows need a list is known on the device only, and a conditional in XLA would have the host
wait for it. So both kernels are always started, and return at once for a row that keeps its list.

A program takes 64 compressed blocks as rows of a tile and the query heads of a key head as its
columns: with the log-sum-exp of each head known, the sum of exp2(c q . k - lse) over the heads is
one along a row. The second kernel is that of `select_blocks`, on one row.
"""

# mypy: disable-error-code="no-untyped-def"

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_select_blocks.reference import Sizes
from pallas_kernels.mosaic import decode, decode_walk, tiles
from pallas_kernels.mosaic.key_walk import copy_all
from pallas_kernels.mosaic.tiles import ROWS
from pallas_kernels.select_blocks.largest import LANES, MAX_LIST, WARPS, largest

# What the number of scores of a row is a multiple of; the kernel does not compile for one a lane.
COLUMNS = 4 * WARPS * LANES


# Compiled by itself, so that layers of the same sizes are lowered once.
@functools.partial(jax.jit, static_argnames=("sizes", "scale", "interpret"))
def decode_select_blocks(
    query: jax.Array,
    key: jax.Array,
    rope_key: jax.Array | None,
    lse: jax.Array,
    block_indices: jax.Array,
    lengths: jax.Array,
    sizes: Sizes,
    scale: float,
    *,
    interpret: Any = None,
) -> jax.Array:
    """See `api.decode_select_blocks`; `interpret` is for tests.

    Raises:
      NotImplementedError: The kernels cannot take the call.
    """
    cache = decode_walk.Cache(key, None, rope_key)
    check_supported(query, cache, block_indices.shape[2], sizes)
    starts_list = sizes.starts_list(lengths)
    own = jnp.where(starts_list, (lengths - 1) // sizes.block_size, -1)
    # Blocks before the own one compete, and no compressed block behind them counts for these.
    counts = jnp.maximum(own, 0) * (sizes.block_size // sizes.compression_stride)
    attention = attention_of_heads(query, cache, lse, counts, scale, interpret)
    num_columns = sizes.num_blocks(key.shape[1])
    num_columns += -num_columns % COLUMNS
    importance = sizes.importance(attention[:, :, None], num_columns)
    by_warp = importance.reshape(*importance.shape[:2], 1, WARPS, -1, LANES).swapaxes(3, 4)
    lists = largest(
        by_warp, own[:, None], jnp.zeros_like(own)[:, None], block_indices[:, None],
        size=block_indices.shape[2], interpret=interpret,
    )  # fmt: skip
    return lists[:, 0]


def check_supported(
    query: jax.Array, cache: decode_walk.Cache, num_selected_blocks: int, sizes: Sizes
) -> None:
    """Raises NotImplementedError, naming the value, for what the kernels do not take."""
    decode_walk.check_cache(cache, ROWS)
    decode_walk.check_group(query, cache)
    if not 3 <= num_selected_blocks <= MAX_LIST:
        raise NotImplementedError(f"block_indices: {num_selected_blocks}, not 3 .. {MAX_LIST}")
    if sizes.compression_block_size - sizes.compression_stride > sizes.block_size:
        raise NotImplementedError(
            f"compression_block_size {sizes.compression_block_size}: more than block_size "
            f"{sizes.block_size} + compression_stride {sizes.compression_stride}"
        )


def attention_of_heads(
    query: jax.Array,
    cache: decode_walk.Cache,
    lse: jax.Array,
    counts: jax.Array,
    scale: float,
    interpret: Any,
) -> jax.Array:
    """Sums over the query heads of a key head what they pay to each key.

    Args:
      query: [B, N, R + HR].
      cache: C keys.
      lse: [B, N].
      counts: int32 [B], keys to take; what comes behind the tiles that hold them is undefined.
      scale: Factor of the scores.
      interpret: Parameters of interpret mode.

    Returns:
      float32 [B, K, C].
    """
    batch, num_keys, num_kv_heads, width = cache.key.shape
    dtype, exponent = cache.key.dtype, scale * tiles.LOG2E
    query, rope_query = decode.split_query(query.astype(dtype), num_kv_heads, width, 1)
    query, rows = query[:, :, 0], query.shape[3]
    lse = lse.reshape(batch, num_kv_heads, -1) * tiles.LOG2E
    padding = ((0, 0), (0, 0), (0, rows - lse.shape[2]))
    lse = jnp.pad(lse, padding, constant_values=jnp.inf)  # of which no head pays anything
    rope = rope_query is not None
    rope_width = cache.rope_key.shape[2] if cache.rope_key is not None else 0

    def body(
        q_ref, rope_q_ref, k_ref, rope_k_ref, lse_ref, counts_ref, sums_ref, *,
        q_s, rope_q_s, k_s, rope_k_s, sums_s, bar,
    ):  # fmt: skip
        batch_id, tile, head = (lax.axis_index(name) for name in ("batch", "tile", "head"))

        @pl.when(tile * ROWS < counts_ref[batch_id])
        def _sum():
            start = jnp.minimum(tile * ROWS, num_keys - ROWS)
            keys = pl.ds(start, ROWS)
            copies = [(q_ref.at[batch_id, head], q_s), (k_ref.at[batch_id, keys, head], k_s)]
            if rope:
                copies.append((rope_q_ref.at[batch_id, head], rope_q_s))
                copies.append((rope_k_ref.at[batch_id, keys], rope_k_s))
            copy_all(copies, bar)
            by_column = tiles.LAYOUT.reduce(0)
            head_lse = plgpu.load(lse_ref.at[batch_id, head], layout=by_column, optimized=False)
            plgpu.barrier_wait(bar)
            pairs = [(k_s, tiles.transposed(q_s))]
            if rope:
                pairs.append((rope_k_s, tiles.transposed(rope_q_s)))
            scores = tiles.matmul(*pairs) * exponent
            scores = scores - lax.broadcast_in_dim(head_lse, (ROWS, rows), [1])
            sums_s[...] = jnp.exp2(scores).sum(axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums_s, sums_ref.at[batch_id, head, keys])
            plgpu.wait_smem_to_gmem(0)

    scratch: dict[str, Any] = {
        "q_s": tiles.tiled((rows, width), dtype),
        "rope_q_s": tiles.tiled((rows, rope_width), dtype) if rope else None,
        "k_s": tiles.tiled((ROWS, width), dtype),
        "rope_k_s": tiles.tiled((ROWS, rope_width), dtype) if rope else None,
        "sums_s": plgpu.SMEM((ROWS,), jnp.float32),
        "bar": plgpu.Barrier(num_arrivals=2 + 2 * rope),
    }
    sums = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (batch, num_kv_heads, num_keys + -num_keys % ROWS), jnp.float32
        ),
        kernel_name="decode_select_blocks_attention",
        grid=(batch, pl.cdiv(num_keys, ROWS), num_kv_heads),
        grid_names=("batch", "tile", "head"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(query, rope_query, cache.key, cache.rope_key, lse, counts.astype(jnp.int32))
    return sums[..., :num_keys]
