"""Gradient of the query of attention to a contiguous range of keys per token.

With p = exp2(c s - lse) and delta = do . o - dlse: ds = scale p (do . v - delta), dq = ds k. A
program owns the tokens that it owns in the forward pass and walks their keys in the same way, with
queries, but wide ones, and do where there is room, in registers: scores from two operands in shared
memory keep it as busy as the tensor cores.
"""

# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import key_walk, overlap, tiles
from pallas_kernels.mosaic.key_range import Documents, KeyRange
from pallas_kernels.mosaic.key_walk import NARROW, SLOTS, Items, KeyWalk, Ring

MOST_BYTES = 224 * 2**10  # of tiles in shared memory


def key_tile(head_dim: int) -> tuple[int, int]:
    """Returns keys of a tile, two of whose scores registers hold beside dq, and slots of them."""
    return (64, SLOTS) if head_dim <= NARROW else (32, SLOTS + 1)


def keeps_doutput(head_dim: int, value_dim: int) -> bool:
    """Returns whether registers hold do beside queries, their gradient and two tiles of scores."""
    width, _ = key_tile(head_dim)
    return head_dim // 2 + width + (head_dim + value_dim) // 4 <= key_walk.TILE_REGISTERS


def flash_dq(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    output: jax.Array,
    doutput: jax.Array,
    lse: jax.Array,
    dlse: jax.Array,
    documents: Documents | None,
    *,
    key_range: KeyRange,
    scale: float,
    name: str,
    warpgroups: int = 2,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradient of query, and scale * delta for that of keys and values.

    Args:
      query: [B, T, N, H], T a multiple of 64 * warpgroups.
      key: [B, S, K, H], S a multiple of 128.
      value: [B, S, K, h], or None: the first h numbers of each key.
      output: [B, T, N, h] of `flash_forward`.
      doutput: [B, T, N, h] cotangent of it.
      lse: [B, N, T] base-2 log-sum-exp of `flash_forward`.
      dlse: [B, N, T] float32, cotangent of the natural log-sum-exp.
      documents: Bounds of packed documents, None = one document a row.
      key_range: The keys that a token sees.
      scale: Factor of the scores.
      name: Of the kernel, in profiles.
      warpgroups: Warpgroups that compute.
      interpret: Parameters of interpret mode, for tests.

    Returns:
      [B, T, N, H] in query's dtype; [B, N, T] in float32.
    """
    batch, length, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    value_dim = output.shape[-1]
    items = Items(batch, num_heads, length // (warpgroups * tiles.ROWS))
    dtype, exponent = query.dtype, scale * tiles.LOG2E
    shared, packed = value is None, documents is not None
    width, slots = key_tile(head_dim)
    is_wide = head_dim > NARROW
    # The gradient takes the memory of the queries where there is none for it beside the rest.
    numbers = 2 * warpgroups * tiles.ROWS * (head_dim + value_dim)
    numbers += slots * width * (head_dim if shared else head_dim + value_dim)
    own_memory = numbers * dtype.itemsize <= MOST_BYTES
    # When an item's tokens make room for those of the next one.
    free_after = "store" if not own_memory else "walk"
    if own_memory and keeps_doutput(head_dim, value_dim):
        free_after = "load"

    def body(
        q_ref, k_ref, v_ref, o_ref, do_ref, lse_ref, dlse_ref, documents, dq_ref, delta_ref, *,
        q_s, o_s, do_s, k_s, v_s, dq_s, lse_s, dlse_s, delta_s, start_s, token_bar, read_bar,
        k_full, k_free, v_full, v_free,
    ):  # fmt: skip
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        num_own = items.num_of(program)
        key_ring = Ring(k_ref, k_s, k_full, k_free)
        value_ring = key_ring if shared else Ring(v_ref, v_s, v_full, v_free)

        def item(n):
            batch_id, tile, head = items.item(program, n)
            keys = KeyWalk(key_range, documents, num_keys, width, warpgroups, batch_id, tile)
            return head, keys

        @pl.when(warpgroup == warpgroups)
        def _fetch():
            plgpu.set_max_registers(key_walk.FETCH_REGISTERS, action="decrease")

            def own_copies(keys, head, w):
                batch_id, rows = keys.batch_id, pl.ds(keys.first_token(w), tiles.ROWS)
                copies = [
                    (q_ref.at[batch_id, rows, head], q_s.at[w]),
                    *([] if is_wide else [(o_ref.at[batch_id, rows, head], o_s.at[w])]),
                    (do_ref.at[batch_id, rows, head], do_s.at[w]),
                    (lse_ref.at[batch_id, head, rows], lse_s.at[w]),
                    (dlse_ref.at[batch_id, head, rows], dlse_s.at[w]),
                ]
                if packed:
                    copies.append((documents.start.at[batch_id, rows], start_s.at[w]))
                return copies

            rings = [key_ring] if shared else [key_ring, value_ring]
            group = num_heads // num_kv_heads
            key_walk.fetch_items(num_own, item, own_copies, rings, group, token_bar, read_bar)

        @pl.when(warpgroup < warpgroups)
        def _compute():
            plgpu.set_max_registers(key_walk.COMPUTE_REGISTERS, action="increase")
            q_w, do_w = q_s.at[warpgroup], do_s.at[warpgroup]
            lse_w, dlse_w, delta_w = (x.at[warpgroup] for x in (lse_s, dlse_s, delta_s))
            dq_w = dq_s.at[warpgroup] if own_memory else q_w

            def output_tile(keys, head):
                """Reads the output; where there is no room for it, where it is."""
                if not is_wide:
                    return o_s.at[warpgroup][...]
                rows = pl.ds(keys.first_token(warpgroup), tiles.ROWS)
                o_w = o_ref.at[keys.batch_id, rows, head]
                return plgpu.load(o_w, layout=tiles.LAYOUT, optimized=False)

            def free_tokens(moment):
                if moment == free_after:
                    plgpu.barrier_arrive(read_bar.at[warpgroup])

            def differentiate_item(n, count):
                head, keys = item(n)
                bounds = begin, _, _, end = keys.bounds(warpgroup)
                plgpu.barrier_wait(token_bar.at[warpgroup])
                mask = keys.mask(warpgroup, start_s.at[warpgroup] if packed else None)
                lse = plgpu.load(lse_w, layout=tiles.BY_ROW)
                outputs = output_tile(keys, head).astype(jnp.float32)
                delta = (outputs * do_w[...].astype(jnp.float32)).sum(axis=1)
                delta = scale * (delta - plgpu.load(dlse_w, layout=tiles.BY_ROW))
                delta = jnp.where(lse < jnp.inf, delta, 0.0)
                query_tile, doutput_tile = q_w, do_w
                if not is_wide:
                    query_tile = plgpu.load(q_w, layout=tiles.LAYOUT)
                if keeps_doutput(head_dim, value_dim):
                    doutput_tile = plgpu.load(do_w, layout=tiles.LAYOUT)
                free_tokens("load")

                def step(i, dquery, masked):
                    number = count + i - begin
                    k_w = key_ring.wait(number)
                    v_w = k_w.at[:, pl.ds(0, value_dim)] if shared else value_ring.wait(number)

                    def weigh(scores):
                        scores = scores * exponent - tiles.across(lse, width)
                        return jnp.exp2(mask(i, scores) if masked else scores)

                    def differentiate(weights, dweights):
                        return weights * (dweights * scale - tiles.across(delta, width))

                    factors = [
                        [(query_tile, tiles.transposed(k_w))],
                        [(doutput_tile, tiles.transposed(v_w))],
                    ]
                    _, _, dscores = overlap.scores_during_sums(
                        (factors, weigh, differentiate), (), [], interpret
                    )
                    dscores = dscores.astype(dtype)
                    products = [[(dscores, part)] for part in tiles.column_parts(k_w)]
                    dquery = tiles.add_matmuls(dquery, *products, interpret=interpret)
                    key_ring.release(number)
                    if not shared:
                        value_ring.release(number)
                    return dquery

                zeros = tuple(tiles.zeros(part.shape) for part in tiles.column_parts(q_w))
                dquery = key_walk.walk(bounds, step, zeros)
                free_tokens("walk")
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for part, total in zip(tiles.column_parts(dq_w), dquery, strict=True):
                    part[...] = total.astype(dtype)
                delta_w[...] = delta
                plgpu.commit_smem()
                rows = pl.ds(keys.first_token(warpgroup), tiles.ROWS)
                plgpu.copy_smem_to_gmem(dq_w, dq_ref.at[keys.batch_id, rows, head])
                plgpu.copy_smem_to_gmem(delta_w, delta_ref.at[keys.batch_id, head, rows])
                if free_after == "store":
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                free_tokens("store")
                return count + end - begin

            lax.fori_loop(0, num_own, differentiate_item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    tokens = (warpgroups, tiles.ROWS)
    # Operands of one product need one swizzle, no wider than a tile of keys.
    like_key = tiles.transforms(math.gcd(head_dim, width), dtype)
    like_value = like_key if shared else tiles.transforms(value_dim, dtype)
    full, free = (plgpu.Barrier(num_barriers=slots, num_arrivals=n) for n in (1, warpgroups))
    scratch: dict[str, Any] = {
        "q_s": plgpu.SMEM((*tokens, head_dim), dtype, transforms=like_key),
        "o_s": None if is_wide else tiles.tiled((*tokens, value_dim), dtype),
        "do_s": plgpu.SMEM((*tokens, value_dim), dtype, transforms=like_value),
        "k_s": plgpu.SMEM((slots, width, head_dim), dtype, transforms=like_key),
        "v_s": None if shared else tiles.tiled((slots, width, value_dim), dtype),
        "dq_s": tiles.tiled((*tokens, head_dim), dtype) if own_memory else None,
        "lse_s": plgpu.SMEM(tokens, jnp.float32),
        "dlse_s": plgpu.SMEM(tokens, jnp.float32),
        "delta_s": plgpu.SMEM(tokens, jnp.float32),
        "start_s": plgpu.SMEM(tokens, jnp.int32) if packed else None,
        "token_bar": plgpu.Barrier(num_barriers=warpgroups, num_arrivals=5 - is_wide + packed),
        "read_bar": plgpu.Barrier(num_barriers=warpgroups),
        "k_full": full,
        "k_free": free,
        "v_full": None if shared else full,
        "v_free": None if shared else free,
    }
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(query.shape, dtype),
            jax.ShapeDtypeStruct(lse.shape, jnp.float32),
        ),
        kernel_name=name,
        grid=(items.num_programs,),
        grid_names=("program",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=key_walk.PARAMETERS,
        interpret=interpret,
    )(query, key, value, output, doutput, lse, dlse, documents)
