"""Mosaic GPU kernel of async_tls_attention: tiles of gathered tokens, split over programs, merged.

`mosaic.decode` with tiles whose 64 keys come from anywhere: the softmax, the splits and their merge
are the same, and so is the reason for them. Here the threads copy the keys themselves
(`mosaic.gather`), those of a warpgroup the part of a value that is its own; a program needs few
tiles, often one, so what keeps memory busy is several programs on a multiprocessor.
"""

# mypy: disable-error-code="no-untyped-def"

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import decode, decode_walk, gather, tiles
from pallas_kernels.mosaic.decode_walk import KEYS, Cache, Tiling
from pallas_kernels.mosaic.gather import COPY_BYTES
from pallas_kernels.mosaic.key_walk import copy_all
from pallas_kernels.mosaic.tiles import ROWS


# Compiled by itself, so that layers of the same sizes are lowered once.
@functools.partial(jax.jit, static_argnames=("scale", "value_columns", "splits", "interpret"))
def async_tls_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    positions: jax.Array,
    rope_key: jax.Array | None,
    scale: float,
    value_columns: tuple[int, int] | None = None,
    *,
    splits: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.async_tls_attention`; `splits` and `interpret` are for tests.

    Raises:
      NotImplementedError: The kernel cannot take the call.
    """
    arrays = Cache(key, value, rope_key)
    cache = arrays if value_columns is None else unpacked(query.shape[2], key, value_columns)
    sizes = decode_walk.tiling(cache)
    decode_walk.check_group(query, cache)
    num_heads, num_kv_heads = query.shape[1], key.shape[2]
    padding = ((0, 0), (0, 0), (0, -positions.shape[2] % KEYS))
    positions = jnp.pad(positions.astype(jnp.int32), padding, constant_values=-1)
    num_tiles = positions.shape[2] // KEYS
    splits = splits or decode_walk.num_splits(
        query.shape[0] * num_kv_heads, num_tiles, sizes.resident
    )
    queries = decode.split_query(
        query.astype(key.dtype), num_kv_heads, cache.key.shape[3], sizes.warpgroups
    )
    positions = positions.reshape(*positions.shape[:2], num_tiles, KEYS)
    outputs, lse = _attend_splits(
        queries, arrays, cache, value_columns, positions,
        scale=scale, sizes=sizes, splits=splits, interpret=interpret,
    )  # fmt: skip
    return decode.merge(outputs, lse, num_heads)


def unpacked(head_dim: int, packed: jax.Array, value_columns: tuple[int, int]) -> Cache:
    """Shapes of the keys, values and rotated keys that an array [B, S, K, W] holds.

    Raises:
      NotImplementedError: Copies cannot begin where they do, or values are part of a key otherwise
        than as its first numbers.
    """
    begin, end = value_columns
    if any(number * packed.dtype.itemsize % COPY_BYTES for number in (packed.shape[3], begin)):
        raise NotImplementedError(
            f"key: {packed.shape[3]} numbers with values from {begin} on, not whole {COPY_BYTES} "
            "bytes"
        )
    if 0 < begin < head_dim or (begin == 0 and end > head_dim):
        raise NotImplementedError(
            f"value_columns: {value_columns} are neither behind a key of {head_dim} numbers nor "
            "its first"
        )

    def of(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((*packed.shape[:2], *shape), packed.dtype)

    num_kv_heads = packed.shape[2]
    if begin > 0:
        return Cache(of(num_kv_heads, head_dim), of(num_kv_heads, end - begin), None)
    if num_kv_heads > 1:
        raise NotImplementedError(f"key: latents of {num_kv_heads} heads, the kernel takes one")
    rope = of(head_dim - end) if end < head_dim else None
    return Cache(of(num_kv_heads, end), None, rope)


def _attend_splits(
    queries, arrays: Cache, cache: Cache, value_columns, positions, *,
    scale: float, sizes: Tiling, splits: int, interpret: Any,
):  # fmt: skip
    """Attends to each split: outputs [B, K, splits, parts, G, h / parts], lse [.., splits, 64].

    `arrays` are in memory; `cache` is what they hold, `value_columns` where one array holds it all.
    """
    query, rope_query = queries
    batch, num_kv_heads, parts, rows, width = query.shape
    num_tiles = positions.shape[2]
    each = pl.cdiv(num_tiles, splits)  # tiles of a program
    slots = min(sizes.slots, each)
    dtype, exponent = query.dtype, scale * tiles.LOG2E
    shared, rope = cache.value is None, rope_query is not None
    rope_shape = () if cache.rope_key is None else (cache.rope_key.shape[2],)

    def body(
        q_ref, rope_q_ref, k_ref, v_ref, rope_k_ref, positions_ref, o_ref, lse_ref, *,
        q_s, rope_q_s, k_s, v_s, rope_k_s, rows_s, lse_s, start_bar, full_bar, free_bar,
    ):  # fmt: skip
        part = lax.axis_index("warpgroup")
        batch_id, split, head = (lax.axis_index(name) for name in ("batch", "split", "head"))
        place, begin = (batch_id, head), split * each

        def values_of(of_head, v_ref):
            if value_columns is None:
                return v_ref.at[batch_id, :, head]
            return of_head.at[:, pl.ds(value_columns[0], width)]

        def rope_of(of_head, rope_k_ref):
            if value_columns is None:
                return rope_k_ref.at[batch_id]
            return of_head.at[:, pl.ds(value_columns[1], *rope_shape)]

        count = jnp.clip(num_tiles - begin, 0, each)

        def fetch(tile):
            """Starts the copies of a tile, if the split has it, as one group."""
            slot = lax.rem(tile, jnp.int32(slots))
            start = functools.partial(gather.gather_rows, rows_s.at[tile], interpret=interpret)
            of_head = k_ref.at[batch_id, :, head]

            @pl.when(tile < count)
            def _start():
                columns = pl.ds(part * width, width)
                start(of_head.at[:, columns], k_s.at[slot, part])
                if not shared:
                    start(values_of(of_head, v_ref), v_s.at[slot])
                if rope:
                    source = rope_of(of_head, rope_k_ref)
                    pl.when(part == 0)(lambda: start(source, rope_k_s.at[slot]))

            gather.commit_gathers(interpret=interpret)

        @pl.when(part == 0)
        def _start():
            copies = [(q_ref.at[*place, p], q_s.at[p, pl.ds(0, rows)]) for p in range(parts)]
            if rope:
                copies.append((rope_q_ref.at[place], rope_q_s.at[pl.ds(0, rows)]))
            for i in range(each):
                of_tile = positions_ref.at[*place, jnp.minimum(begin + i, num_tiles - 1)]
                copies.append((of_tile, rows_s.at[i]))
            copy_all(copies, start_bar)

        plgpu.barrier_wait(start_bar)
        for tile in range(slots):
            fetch(jnp.int32(tile))

        def step(tile, carry):
            sums, maximum, total = carry
            slot = lax.rem(tile, jnp.int32(slots))
            gather.wait_gathers(slots - 1, interpret=interpret)
            plgpu.commit_smem()
            _meet(full_bar, parts)
            pairs = [(q_s.at[p], tiles.transposed(k_s.at[slot, p])) for p in range(parts)]
            if rope:
                pairs.append((rope_q_s, tiles.transposed(rope_k_s.at[slot])))
            scores = _mask(tiles.matmul(*pairs) * exponent, rows_s.at[tile])
            new_maximum = jnp.maximum(maximum, scores.max(axis=1))
            weights = jnp.exp2(scores - tiles.across(new_maximum, KEYS))
            rescale = jnp.exp2(maximum - new_maximum)
            total = total * rescale + weights.sum(axis=1)
            values = k_s.at[slot, part] if shared else v_s.at[slot]
            sums = sums * tiles.across(rescale, width)
            sums = tiles.add_matmul(sums, weights.astype(dtype), values, interpret=interpret)
            if each > slots:
                _meet(free_bar, parts)
            fetch(jnp.minimum(tile + slots, each))
            return sums, new_maximum, total

        nothing = tiles.zeros((ROWS,))
        carry = tiles.zeros((ROWS, width)), nothing + tiles.NO_MAXIMUM, nothing
        sums, maximum, total = lax.fori_loop(0, count, step, carry)
        _meet(free_bar, parts)  # the others may still read the query, whose place the output takes
        o_s = q_s.at[part]
        o_s[...] = (sums * tiles.across(1 / jnp.where(total > 0, total, 1), width)).astype(dtype)
        lse_s[part] = jnp.where(total > 0, maximum + jnp.log2(total), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s.at[pl.ds(0, rows)], o_ref.at[*place, split, part])
        lse_target = lse_ref.at[*place, split]
        pl.when(part == 0)(lambda: plgpu.copy_smem_to_gmem(lse_s.at[0], lse_target))
        plgpu.wait_smem_to_gmem(0)

    scratch: dict[str, Any] = {
        "q_s": tiles.tiled((parts, ROWS, width), dtype),
        "rope_q_s": tiles.tiled((ROWS, *rope_shape), dtype) if rope else None,
        "k_s": tiles.tiled((slots, parts, KEYS, width), dtype),
        "v_s": None if shared else tiles.tiled((slots, KEYS, width), dtype),
        "rope_k_s": tiles.tiled((slots, KEYS, *rope_shape), dtype) if rope else None,
        "rows_s": plgpu.SMEM((each, KEYS), jnp.int32),
        "lse_s": plgpu.SMEM((parts, ROWS), jnp.float32),
        "start_bar": plgpu.Barrier(num_arrivals=parts + rope + each),
        "full_bar": plgpu.Barrier(num_arrivals=parts),
        "free_bar": plgpu.Barrier(num_arrivals=parts),
    }
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, num_kv_heads, splits, parts, rows, width), dtype),
            jax.ShapeDtypeStruct((batch, num_kv_heads, splits, ROWS), jnp.float32),
        ),
        kernel_name="async_tls_attention",
        grid=(batch, splits, num_kv_heads),
        grid_names=("batch", "split", "head"),
        num_threads=parts,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(query, rope_query, arrays.key, arrays.value, arrays.rope_key, positions)


def _meet(barrier: Any, parts: int) -> None:
    """Waits for all warpgroups of the program."""
    if parts > 1:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)


def _mask(scores: jax.Array, rows_ref: Any) -> jax.Array:
    """Sets to -inf the scores of places on the list without a token."""
    listed = plgpu.load(rows_ref, layout=tiles.LAYOUT.reduce(0), optimized=False)
    listed = lax.broadcast_in_dim(listed, scores.shape, [1])
    return jnp.where(listed >= 0, scores, -jnp.inf)
