"""Attention of one query a row to a cache: tiles of keys, split over many programs, then merged.

A program owns the query heads of a key head, padded to the 64 rows of a tile, and one split of the
keys of that head: with m the running maximum of the scores in base 2, o = sum exp2(s - m) v / l and
lse = m + log2 l, l = sum exp2(s - m). Splits merge by o = sum exp2(lse_i - lse) o_i with
lse = log2 sum exp2(lse_i). Memory is what bounds the work, so most of a tile may be padding, and
what counts is that every multiprocessor has many copies under way.

A tile holds 64 keys, from one place or, for lists of blocks, from several. Latents are keys and
values at once; the rotated keys beside them are shared by the key heads. Values of more than 256
numbers are cut in parts, one a warpgroup, each of which takes the softmax anew.
"""

# mypy: disable-error-code="no-untyped-def"

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import decode_walk, tiles
from pallas_kernels.mosaic.decode_walk import KEYS, Cache, Tiling
from pallas_kernels.mosaic.key_walk import copy_all
from pallas_kernels.mosaic.tiles import ROWS

COPY_ROWS = 8  # of a tile: the least that a copy takes
FEW_SPLITS = 64  # of which the merge is written out


def decode(
    query: jax.Array,
    cache: Cache,
    lengths: jax.Array,
    block_indices: jax.Array | None,
    *,
    scale: float,
    sizes: Tiling,
    splits: int,
    name: str,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the first `lengths` keys of each row, or to those of them in listed blocks.

    Args:
      query: [B, N, R + HR].
      cache: Keys and values.
      lengths: int32 [B].
      block_indices: int32 [B, K, L], ascending, then -1, of blocks of `sizes.piece` tokens, L a
        multiple of `sizes.pieces`; None = all keys.
      scale: Factor of the scores.
      sizes: From `tiling`.
      splits: Programs for each row and key head.
      name: Of the kernel, in profiles.
      interpret: Parameters of interpret mode, for tests.

    Returns:
      Output [B, N, h] and log-sum-exp [B, N] in float32; 0 and -inf where nothing is seen.
    """
    decode_walk.check_group(query, cache)
    num_heads, num_kv_heads = query.shape[1], cache.key.shape[2]
    query = query.astype(cache.key.dtype)
    queries = split_query(query, num_kv_heads, cache.key.shape[3], sizes.warpgroups)
    outputs, lse = _decode_splits(
        queries, cache, lengths, block_indices,
        scale=scale, sizes=sizes, splits=splits, name=name, interpret=interpret,
    )  # fmt: skip
    return merge(outputs, lse, num_heads)


def split_query(
    query: jax.Array, num_kv_heads: int, width: int, parts: int
) -> tuple[jax.Array, jax.Array | None]:
    """Arranges queries [B, N, R + HR] as [B, K, parts, G, R / parts] and [B, K, G, HR] or None.

    G is padded to what a copy takes.
    """
    batch, num_heads, _ = query.shape
    group = num_heads // num_kv_heads
    by_group = query.reshape(batch, num_kv_heads, group, -1)
    by_group = jnp.pad(by_group, ((0, 0), (0, 0), (0, -group % COPY_ROWS), (0, 0)))
    by_part = by_group[..., :width].reshape(*by_group.shape[:3], parts, width // parts)
    rope = by_group[..., width:] if query.shape[2] > width else None
    return by_part.swapaxes(2, 3), rope


def merge(outputs: jax.Array, lse: jax.Array, num_heads: int) -> tuple[jax.Array, jax.Array]:
    """Merges splits of the keys by their log-sum-exp.

    Args:
      outputs: [B, K, splits, parts, rows, h / parts], rows at least N / K.
      lse: Base 2, [B, K, splits, rows or more].
      num_heads: N.

    Returns:
      Output [B, N, h] in the type of outputs, log-sum-exp [B, N] in base e.
    """
    batch, num_kv_heads, splits = lse.shape[:3]
    if splits <= FEW_SPLITS:
        return _merge_few(outputs, lse, num_heads)
    group = num_heads // num_kv_heads
    lse, outputs = lse[..., :group], outputs[..., :group, :]
    maximum = lse.max(axis=2, keepdims=True)
    shares = jnp.exp2(lse - jnp.where(maximum > -jnp.inf, maximum, 0))
    total = shares.sum(axis=2, keepdims=True)
    shares = (shares / jnp.where(total > 0, total, 1))[:, :, :, None, :, None]
    output = (shares * outputs.astype(jnp.float32)).sum(axis=2).astype(outputs.dtype)
    output = output.swapaxes(2, 3).reshape(batch, num_heads, -1)
    lse = (maximum + jnp.log2(total)) / tiles.LOG2E
    return output, lse.reshape(batch, num_heads)


def _merge_few(outputs: jax.Array, lse: jax.Array, num_heads: int) -> tuple[jax.Array, jax.Array]:
    """`merge` of few splits, one after another: XLA makes a kernel of it instead of four."""
    batch, num_kv_heads, splits = lse.shape[:3]
    group = num_heads // num_kv_heads
    of_splits = [lse[:, :, i, :group] for i in range(splits)]
    maximum = functools.reduce(jnp.maximum, of_splits)
    finite = jnp.where(maximum > -jnp.inf, maximum, 0)
    shares = [jnp.exp2(x - finite) for x in of_splits]
    total = functools.reduce(jnp.add, shares)
    weighed = [
        share[:, :, None, :, None] * outputs[:, :, i, :, :group].astype(jnp.float32)
        for i, share in enumerate(shares)
    ]
    output = functools.reduce(jnp.add, weighed)
    output = output / jnp.where(total > 0, total, 1)[:, :, None, :, None]
    output = output.swapaxes(2, 3).reshape(batch, num_heads, -1).astype(outputs.dtype)
    lse = (maximum + jnp.log2(total)) / tiles.LOG2E
    return output, lse.reshape(batch, num_heads)


def _decode_splits(
    queries, cache, lengths, block_indices, *, scale, sizes, splits, name, interpret
):
    """Attends to each split: outputs [B, K, splits, parts, G, h / parts], lse [.., splits, 64]."""
    batch, num_keys, num_kv_heads, _ = cache.key.shape
    query, rope_query = queries
    parts, rows, width = query.shape[2:]
    dtype, exponent = query.dtype, scale * tiles.LOG2E
    shared, rope = cache.value is None, rope_query is not None
    arrays = (cache.key, cache.value, cache.rope_key)

    def body(
        q_ref, rope_q_ref, k_ref, v_ref, rope_k_ref, lengths_ref, entries_ref, o_ref, lse_ref, *,
        q_s, rope_q_s, k_s, v_s, rope_k_s, lse_s, q_bar, full_bar, free_bar, end_bar,
    ):  # fmt: skip
        part, split = lax.axis_index("warpgroup"), lax.axis_index("split")
        walk = decode_walk.walk_split(sizes, num_keys, lengths_ref, entries_ref, splits)
        place = walk.batch_id, walk.head

        def fetch_query():
            copies = [(q_ref.at[*place, p], q_s.at[p, pl.ds(0, rows)]) for p in range(parts)]
            if rope:
                copies.append((rope_q_ref.at[place], rope_q_s.at[pl.ds(0, rows)]))
            copy_all(copies, q_bar)

        def fetch(tile):
            slot, copies = lax.rem(tile, jnp.int32(sizes.slots)), []
            for number in range(sizes.pieces):
                start, _, _ = walk.piece(tile, number)
                source, target = pl.ds(start, sizes.piece), pl.ds(number * sizes.piece, sizes.piece)
                keys = k_ref.at[walk.batch_id, source, walk.head]
                for p in range(parts):
                    columns = keys if parts == 1 else keys.at[:, pl.ds(p * width, width)]
                    copies.append((columns, k_s.at[slot, p, target]))
                if not shared:
                    values = v_ref.at[walk.batch_id, source, walk.head]
                    copies.append((values, v_s.at[slot, target]))
                if rope:
                    keys = rope_k_ref.at[walk.batch_id, source]
                    copies.append((keys, rope_k_s.at[slot, target]))
            copy_all(copies, full_bar.at[slot])

        def refill(tile):
            """Fetches into the slot of a tile that this warpgroup has done with."""
            slot = lax.rem(tile, jnp.int32(sizes.slots))
            if parts > 1:
                plgpu.barrier_arrive(free_bar.at[slot])

            @pl.when(part == 0)
            def _fetch():
                if parts > 1:
                    plgpu.barrier_wait(free_bar.at[slot])
                fetch(tile + sizes.slots)

        @pl.when(part == 0)
        def _start():
            fetch_query()
            for tile in range(sizes.slots):
                pl.when(tile < walk.count)(functools.partial(fetch, jnp.int32(tile)))

        plgpu.barrier_wait(q_bar)

        def step(tile, carry):
            sums, maximum, total = carry
            slot = lax.rem(tile, jnp.int32(sizes.slots))
            plgpu.barrier_wait(full_bar.at[slot])
            pairs = [(q_s.at[p], tiles.transposed(k_s.at[slot, p])) for p in range(parts)]
            if rope:
                pairs.append((rope_q_s, tiles.transposed(rope_k_s.at[slot])))
            scores = walk.mask(tile, tiles.matmul(*pairs) * exponent)
            new_maximum = jnp.maximum(maximum, scores.max(axis=1))
            weights = jnp.exp2(scores - tiles.across(new_maximum, KEYS))
            rescale = jnp.exp2(maximum - new_maximum)
            total = total * rescale + weights.sum(axis=1)
            values = k_s.at[slot, part] if shared else v_s.at[slot]
            sums = sums * tiles.across(rescale, width)
            sums = tiles.add_matmul(sums, weights.astype(dtype), values, interpret=interpret)
            pl.when(tile + sizes.slots < walk.count)(lambda: refill(tile))
            return sums, new_maximum, total

        nothing = tiles.zeros((ROWS,))
        carry = tiles.zeros((ROWS, width)), nothing + tiles.NO_MAXIMUM, nothing
        sums, maximum, total = lax.fori_loop(0, walk.count, step, carry)
        if parts > 1:  # the others may still read the query, whose place the output takes
            plgpu.barrier_arrive(end_bar)
            plgpu.barrier_wait(end_bar)
        o_s = q_s.at[part]
        o_s[...] = (sums * tiles.across(1 / jnp.where(total > 0, total, 1), width)).astype(dtype)
        lse_s[part] = jnp.where(total > 0, maximum + jnp.log2(total), -jnp.inf)
        plgpu.commit_smem()
        target = o_ref.at[walk.batch_id, walk.head, split, part]
        plgpu.copy_smem_to_gmem(o_s.at[pl.ds(0, rows)], target)
        lse_target = lse_ref.at[walk.batch_id, walk.head, split]
        pl.when(part == 0)(lambda: plgpu.copy_smem_to_gmem(lse_s.at[0], lse_target))
        plgpu.wait_smem_to_gmem(0)

    num_copies = parts + (not shared) + rope
    rope_shape = (cache.rope_key.shape[2],) if rope else ()
    scratch: dict[str, Any] = {
        "q_s": tiles.tiled((parts, ROWS, width), dtype),
        "rope_q_s": tiles.tiled((ROWS, *rope_shape), dtype) if rope else None,
        "k_s": tiles.tiled((sizes.slots, parts, KEYS, width), dtype),
        "v_s": None if shared else tiles.tiled((sizes.slots, KEYS, width), dtype),
        "rope_k_s": tiles.tiled((sizes.slots, KEYS, *rope_shape), dtype) if rope else None,
        "lse_s": plgpu.SMEM((parts, ROWS), jnp.float32),
        "q_bar": plgpu.Barrier(num_arrivals=parts + rope),
        "full_bar": plgpu.Barrier(num_barriers=sizes.slots, num_arrivals=num_copies * sizes.pieces),
        "free_bar": plgpu.Barrier(num_barriers=sizes.slots, num_arrivals=parts),
        "end_bar": plgpu.Barrier(num_arrivals=parts),
    }
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, num_kv_heads, splits, parts, rows, width), dtype),
            jax.ShapeDtypeStruct((batch, num_kv_heads, splits, ROWS), jnp.float32),
        ),
        kernel_name=name,
        grid=(batch, splits, num_kv_heads),
        grid_names=("batch", "split", "head"),
        num_threads=parts,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(query, rope_query, *arrays, lengths.astype(jnp.int32), block_indices)
