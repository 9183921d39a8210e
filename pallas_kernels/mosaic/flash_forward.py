"""Forward pass of attention to a contiguous range of keys per token.

A program owns 128 consecutive tokens of one query head, 64 a warpgroup, so that every array keeps
the layout of the API and a tile of a head is one strided copy. The warpgroups take the running
softmax over the tiles of keys, o = sum p v / sum p with p = exp2(c s - m); the p v of a tile is
summed during the softmax of the next one. Queries are in registers, but wide ones: the tensor cores
read less from shared memory, which nearly bounds them, and those of the next item are copied in the
meantime.
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
from pallas_kernels.mosaic.key_walk import NARROW, Items, KeyWalk, Ring


def key_tile(head_dim: int, value_dim: int) -> int:
    """Returns how many keys make a tile: 128, or fewer where they would not fit in memory."""
    if head_dim > NARROW:
        return 32
    return 128 if head_dim + value_dim <= 288 else 64


def flash_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    documents: Documents | None,
    *,
    key_range: KeyRange,
    value_dim: int,
    scale: float,
    name: str,
    warpgroups: int = 2,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends from each token to its range of keys.

    Args:
      query: [B, T, N, H], T a multiple of 64 * warpgroups.
      key: [B, S, K, H], S a multiple of 128.
      value: [B, S, K, h], or None: the first h numbers of each key.
      documents: Bounds of packed documents, None = one document a row.
      key_range: The keys that a token sees.
      value_dim: h.
      scale: Factor of the scores.
      name: Of the kernel, in profiles.
      warpgroups: Warpgroups that compute.
      interpret: Parameters of interpret mode, for tests.

    Returns:
      Output [B, T, N, h] and base-2 log-sum-exp [B, N, T] in float32. A token that sees no key has
      output 0 and log-sum-exp +inf, with which the backward pass gives it no weight.
    """
    batch, length, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    width = key_tile(head_dim, value_dim)
    items = Items(batch, num_heads, length // (warpgroups * tiles.ROWS))
    dtype, exponent = query.dtype, scale * tiles.LOG2E
    shared, packed = value is None, documents is not None
    keeps_query = head_dim <= NARROW  # in registers, beside the output
    slots = 3 if shared else 2  # a tile that is key and value is held for two steps

    def body(
        q_ref, k_ref, v_ref, documents, o_ref, lse_ref, *,
        q_s, k_s, v_s, o_s, lse_s, start_s, token_bar, read_bar, k_full, k_free, v_full, v_free,
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
                rows = pl.ds(keys.first_token(w), tiles.ROWS)
                copies = [(q_ref.at[keys.batch_id, rows, head], q_s.at[w])]
                if packed:
                    copies.append((documents.start.at[keys.batch_id, rows], start_s.at[w]))
                return copies

            rings = [key_ring] if shared else [key_ring, value_ring]
            group = num_heads // num_kv_heads
            key_walk.fetch_items(num_own, item, own_copies, rings, group, token_bar, read_bar)

        @pl.when(warpgroup < warpgroups)
        def _compute():
            plgpu.set_max_registers(key_walk.COMPUTE_REGISTERS, action="increase")
            q_w, o_w, lse_w = q_s.at[warpgroup], o_s.at[warpgroup], lse_s.at[warpgroup]

            def attend(n, count):
                head, keys = item(n)
                begin, full_begin, full_end, end = keys.bounds(warpgroup)
                number = count - begin  # of a tile in the ring, less that in the row
                plgpu.barrier_wait(token_bar.at[warpgroup])
                mask = keys.mask(warpgroup, start_s.at[warpgroup] if packed else None)
                query_tile = q_w
                if keeps_query:
                    query_tile = plgpu.load(q_w, layout=tiles.LAYOUT)
                    plgpu.barrier_arrive(read_bar.at[warpgroup])

                def wait_value(i):
                    if shared:
                        return value_ring.tile(number + i).at[:, pl.ds(0, value_dim)]
                    return value_ring.wait(number + i)

                def weigh(i, scores, maximum, total, masked):
                    if not shared:
                        key_ring.release(number + i)
                    scores = mask(i, scores) if masked else scores
                    new_maximum = jnp.maximum(maximum, scores.max(axis=1) * exponent)
                    weights = jnp.exp2(scores * exponent - tiles.across(new_maximum, width))
                    shrink = jnp.exp2(maximum - new_maximum)
                    total = total * shrink + weights.sum(axis=1)
                    return weights, shrink, new_maximum, total

                def step(i, carry, masked):
                    output, weights, maximum, total = carry
                    k_w, v_w = key_ring.wait(number + i), wait_value(i - 1)
                    output, (weights, shrink, maximum, total) = overlap.matmul_during(
                        lambda scores: weigh(i, scores, maximum, total, masked),
                        (query_tile, tiles.transposed(k_w)), output, (weights, v_w), interpret,
                    )  # fmt: skip
                    value_ring.release(number + i - 1)
                    output = output * tiles.across(shrink, value_dim)
                    # Not before: a product in flight would have to wait for its next operand.
                    return output, weights.astype(dtype), maximum, total

                empty = tiles.zeros((tiles.ROWS,))
                k_w = key_ring.wait(number + begin)
                factors = query_tile, tiles.transposed(k_w)
                scores = tiles.matmul(factors, interpret=interpret)
                weights, _, maximum, total = weigh(
                    begin, scores, empty + tiles.NO_MAXIMUM, empty, masked=True
                )
                output = tiles.zeros((tiles.ROWS, value_dim))
                carry = output, weights.astype(dtype), maximum, total
                full_begin, full_end = (jnp.maximum(x, begin + 1) for x in (full_begin, full_end))
                bounds = begin + 1, full_begin, full_end, end
                output, weights, maximum, total = key_walk.walk(bounds, step, carry)
                if not keeps_query:
                    plgpu.barrier_arrive(read_bar.at[warpgroup])
                v_w = wait_value(end - 1)
                output = tiles.add_matmul(output, weights, v_w, interpret=interpret)
                value_ring.release(number + end - 1)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                share = tiles.across(1 / jnp.maximum(total, 1e-30), value_dim)
                o_w[...] = (output * share).astype(dtype)
                lse_w[...] = jnp.where(total > 0, maximum + jnp.log2(total), jnp.inf)
                plgpu.commit_smem()
                rows = pl.ds(keys.first_token(warpgroup), tiles.ROWS)
                plgpu.copy_smem_to_gmem(o_w, o_ref.at[keys.batch_id, rows, head])
                plgpu.copy_smem_to_gmem(lse_w, lse_ref.at[keys.batch_id, head, rows])
                return count + end - begin

            lax.fori_loop(0, num_own, attend, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    tokens = (warpgroups, tiles.ROWS)
    # Keys are rows of one product, so they need a swizzle no wider than a tile of them.
    like_key = tiles.transforms(math.gcd(head_dim, width), dtype)
    full, free = (plgpu.Barrier(num_barriers=slots, num_arrivals=n) for n in (1, warpgroups))
    scratch: dict[str, Any] = {
        "q_s": plgpu.SMEM((*tokens, head_dim), dtype, transforms=like_key),
        "k_s": plgpu.SMEM((slots, width, head_dim), dtype, transforms=like_key),
        "v_s": None if shared else tiles.tiled((slots, width, value_dim), dtype),
        "o_s": tiles.tiled((*tokens, value_dim), dtype),
        "lse_s": plgpu.SMEM(tokens, jnp.float32),
        "start_s": plgpu.SMEM(tokens, jnp.int32) if packed else None,
        "token_bar": plgpu.Barrier(num_barriers=warpgroups, num_arrivals=1 + packed),
        "read_bar": plgpu.Barrier(num_barriers=warpgroups),
        "k_full": full,
        "k_free": free,
        "v_full": None if shared else full,
        "v_free": None if shared else free,
    }
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, num_heads, value_dim), dtype),
            jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32),
        ),
        kernel_name=name,
        grid=(items.num_programs,),
        grid_names=("program",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=key_walk.PARAMETERS,
        interpret=interpret,
    )(query, key, value, documents)
