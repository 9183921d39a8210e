"""Forward pass of attention to a contiguous range of keys per token.

A program owns 128 consecutive tokens of one query head, 64 a warpgroup, so that every array keeps
the layout of the API and a tile of a head is one strided copy. The warpgroups take the running
softmax over the tiles of keys, o = sum p v / sum p with p = exp2(c s - m).
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import key_walk, tiles
from pallas_kernels.mosaic.key_range import Documents, KeyRange
from pallas_kernels.mosaic.key_walk import SLOTS, KeyWalk


def key_tile(head_dim: int, value_dim: int) -> int:
    """Returns how many keys make a tile: 128, or 64 where two tiles would not fit in memory."""
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
      warpgroups: Warpgroups that compute.
      interpret: Parameters of interpret mode, for tests.

    Returns:
      Output [B, T, N, h] and base-2 log-sum-exp [B, N, T] in float32. A token that sees no key has
      output 0 and log-sum-exp +inf, with which the backward pass gives it no weight.
    """
    batch, length, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    width = key_tile(head_dim, value_dim)
    num_tiles = length // (warpgroups * tiles.ROWS)
    dtype, exponent = query.dtype, scale * tiles.LOG2E
    shared, packed = value is None, documents is not None

    def body(
        q_ref, k_ref, v_ref, documents, o_ref, lse_ref, *,
        q_s, k_s, v_s, o_s, lse_s, start_s, token_bar, key_bar, free_bar,
    ):  # fmt: skip
        batch_id, head = lax.axis_index("batch"), lax.axis_index("head")
        tile = num_tiles - 1 - lax.axis_index("tile")  # those with most keys start first
        warpgroup = lax.axis_index("warpgroup")
        keys = KeyWalk(key_range, documents, num_keys, width, warpgroups, batch_id, tile)

        @pl.when(warpgroup == warpgroups)
        def _fetch():
            plgpu.set_max_registers(key_walk.FETCH_REGISTERS, action="decrease")
            kv_head = lax.div(head, jnp.int32(num_heads // num_kv_heads))
            copies = [(k_ref, k_s)] if shared else [(k_ref, k_s), (v_ref, v_s)]
            keys.fetch(copies, kv_head, key_bar, free_bar)

        @pl.when(warpgroup < warpgroups)
        def _compute():
            plgpu.set_max_registers(key_walk.COMPUTE_REGISTERS, action="increase")
            q_w = q_s.at[warpgroup]
            rows = pl.ds(keys.first_token(warpgroup), tiles.ROWS)
            copies = [(q_ref.at[batch_id, rows, head], q_w)]
            if packed:
                copies.append((documents.start.at[batch_id, rows], start_s.at[warpgroup]))
            key_walk.copy_all(copies, token_bar.at[warpgroup])
            bounds = keys.bounds(warpgroup)
            plgpu.barrier_wait(token_bar.at[warpgroup])
            mask = keys.mask(warpgroup, start_s.at[warpgroup] if packed else None)

            def step(i, carry, masked):
                output, maximum, total = carry
                slot = lax.rem(i - bounds[0], jnp.int32(SLOTS))
                k_w = k_s.at[slot]
                v_w = k_w.at[:, pl.ds(0, value_dim)] if shared else v_s.at[slot]
                plgpu.barrier_wait(key_bar.at[slot])
                scores = tiles.matmul((q_w, tiles.transposed(k_w)))
                scores = mask(i, scores) if masked else scores
                new_maximum = jnp.maximum(maximum, scores.max(axis=1) * exponent)
                weights = jnp.exp2(scores * exponent - tiles.across(new_maximum, width))
                shrink = jnp.exp2(maximum - new_maximum)
                total = total * shrink + weights.sum(axis=1)
                output = output * tiles.across(shrink, value_dim)
                output = tiles.add_matmul(output, weights.astype(dtype), v_w, interpret=interpret)
                plgpu.barrier_arrive(free_bar.at[slot])
                return output, new_maximum, total

            empty = tiles.zeros((tiles.ROWS,))
            carry = tiles.zeros((tiles.ROWS, value_dim)), empty + tiles.NO_MAXIMUM, empty
            output, maximum, total = key_walk.walk(bounds, step, carry)
            o_w = q_w if o_s is None else o_s.at[warpgroup]
            share = tiles.across(1 / jnp.maximum(total, 1e-30), value_dim)
            o_w[...] = (output * share).astype(dtype)
            lse_s.at[warpgroup][...] = jnp.where(total > 0, maximum + jnp.log2(total), jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_w, o_ref.at[batch_id, rows, head])
            plgpu.copy_smem_to_gmem(lse_s.at[warpgroup], lse_ref.at[batch_id, head, rows])
            plgpu.wait_smem_to_gmem(0)

    own_output = head_dim != value_dim  # else it takes the place of the query
    tokens = (warpgroups, tiles.ROWS)
    scratch: dict[str, Any] = {
        "q_s": tiles.tiled((*tokens, head_dim), dtype),
        "k_s": tiles.tiled((SLOTS, width, head_dim), dtype),
        "v_s": None if shared else tiles.tiled((SLOTS, width, value_dim), dtype),
        "o_s": tiles.tiled((*tokens, value_dim), dtype) if own_output else None,
        "lse_s": plgpu.SMEM(tokens, jnp.float32),
        "start_s": plgpu.SMEM(tokens, jnp.int32) if packed else None,
        "token_bar": plgpu.Barrier(num_barriers=warpgroups, num_arrivals=1 + packed),
        "key_bar": plgpu.Barrier(num_barriers=SLOTS, num_arrivals=2 - shared),
        "free_bar": plgpu.Barrier(num_barriers=SLOTS, num_arrivals=warpgroups),
    }
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, num_heads, value_dim), dtype),
            jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32),
        ),
        grid=(batch, num_tiles, num_heads),
        grid_names=("batch", "tile", "head"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=key_walk.PARAMETERS,
        interpret=interpret,
    )(query, key, value, documents)
