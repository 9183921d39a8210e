"""Gradients of key and value of attention to a contiguous range of keys per token.

With p = exp2(c s - lse) and delta = do . o - dlse: ds = scale p (do . v - delta), dk = ds^T q and
dv = p^T do. A program owns 128 keys, 64 a warpgroup, and walks the tokens that see them, head after
head and from the last token on, where the walks of all programs start. Scores are transposed, so
that p^T and ds^T go to the tensor cores from registers, and so does what these hold of the keys:
two operands in shared memory keep it as busy as the tensor cores. Where few tiles of keys see many
tokens the walk is cut in parts, whose sums XLA adds in order: nothing is added atomically, and
repeated runs agree bit for bit.
"""

# mypy: disable-error-code="no-untyped-def"

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import key_walk, overlap, tiles
from pallas_kernels.mosaic.key_range import NO_WINDOW, Documents, KeyRange, position, query_at

KEYS = tiles.ROWS  # of a warpgroup
SLOTS = 3  # of the ring of tiles of tokens, which are held for two steps
OVERLAP_DIMS = 192  # of a key in the sums: with more, registers do not hold two tiles beside them
BY_COLUMN = tiles.LAYOUT.reduce(0)  # of a vector with one number a column of a tile


def token_tile(head_dim: int, value_dim: int, shared: bool) -> int:
    """Returns how many tokens make a tile: 64, or 32 where registers hold wide sums beside it."""
    fits = head_dim <= key_walk.NARROW if shared else head_dim + value_dim <= 256
    return 64 if fits else 32


def kept_dims(head_dim: int, sum_dims: int, width: int) -> int:
    """Returns how many numbers of each key registers hold beside its sums and two tiles."""
    used = sum_dims // 2 + width
    if sum_dims <= OVERLAP_DIMS:
        used += width // 2  # weights and dscores of the tile before
    return min(head_dim, 4 * (key_walk.TILE_REGISTERS - used))


def flash_dkv(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    doutput: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    documents: Documents | None,
    *,
    key_range: KeyRange,
    scale: float,
    head_parts: int,
    token_parts: int,
    name: str,
    warpgroups: int = 2,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the gradients of key and value.

    Args:
      query: [B, T, N, H], T a multiple of 64.
      key: [B, S, K, H], S a multiple of 64 * warpgroups.
      value: [B, S, K, h], or None: the first h numbers of each key.
      doutput: [B, T, N, h] cotangent of the output.
      lse: [B, N, T] base-2 log-sum-exp of `flash_forward`.
      delta: [B, N, T] scale * delta of `flash_dq`.
      documents: Bounds of packed documents, None = one document a row.
      key_range: The keys that a token sees.
      scale: Factor of the scores.
      head_parts: Parts in which the query heads of a key head are cut.
      token_parts: Parts in which the tokens that see a tile of keys are cut.
      name: Of the kernel, in profiles.
      warpgroups: Warpgroups that compute.
      interpret: Parameters of interpret mode, for tests.

    Returns:
      [B, S, K, H] in key's dtype; [B, S, K, h], or None: then the first one holds both.
    """
    batch, length, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    value_dim = doutput.shape[-1]
    parts, part_heads = head_parts * token_parts, num_heads // num_kv_heads // head_parts
    dtype, exponent = query.dtype, scale * tiles.LOG2E
    shared, packed, whole = value is None, documents is not None, parts == 1
    width = token_tile(head_dim, value_dim, shared)
    rest_dim = head_dim - value_dim if shared else head_dim
    sum_dims = (value_dim, rest_dim) if rest_dim else (value_dim,)
    kept = kept_dims(head_dim, sum(sum_dims), width)

    def body(
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, documents, dk_ref, dv_ref, *,
        q_s, do_s, k_s, v_s, lse_s, delta_s, start_s, key_bar, token_bar, free_bar,
    ):  # fmt: skip
        batch_id, tile = lax.axis_index("batch"), lax.axis_index("tile")
        kv_head, part = lax.axis_index("kv_head"), lax.axis_index("part")
        warpgroup = lax.axis_index("warpgroup")
        first_head = (kv_head * head_parts + lax.div(part, jnp.int32(token_parts))) * part_heads

        def document_end(ends, key_tile):
            return jnp.int32(length) if ends is None else ends[batch_id, key_tile]

        def first_query(key):
            return query_at(documents, key_range.first_token(key))

        def end_query(key, end):
            return query_at(documents, key_range.end_token(key, end))

        def token_tiles():
            first = tile * (warpgroups * KEYS)
            last_end = documents.last_end if packed else None
            end = document_end(last_end, (tile + 1) * warpgroups - 1)
            end = end_query(first + (warpgroups * KEYS - 1), end)
            end = lax.div(jnp.minimum(end, length) + (width - 1), jnp.int32(width))
            begin = jnp.minimum(lax.div(first_query(first), jnp.int32(width)), end)
            size = lax.div(end - begin + (token_parts - 1), jnp.int32(token_parts))
            begin = jnp.minimum(begin + lax.rem(part, jnp.int32(token_parts)) * size, end)
            return begin, jnp.minimum(begin + size, end)

        begin, end = token_tiles()
        steps = end - begin

        @pl.when(warpgroup == warpgroups)
        def _fetch():
            plgpu.set_max_registers(key_walk.FETCH_REGISTERS, action="decrease")

            def fetch_tile(i, _):
                slot = lax.rem(i, jnp.int32(SLOTS))
                pl.when(i >= SLOTS)(lambda: plgpu.barrier_wait(free_bar.at[slot]))
                head = first_head + lax.div(i, steps)
                rows = pl.ds((end - 1 - lax.rem(i, steps)) * width, width)
                copies = [
                    (q_ref.at[batch_id, rows, head], q_s.at[slot]),
                    (do_ref.at[batch_id, rows, head], do_s.at[slot]),
                    (lse_ref.at[batch_id, head, rows], lse_s.at[slot]),
                    (delta_ref.at[batch_id, head, rows], delta_s.at[slot]),
                ]
                if packed:
                    copies.append((documents.start.at[batch_id, rows], start_s.at[slot]))
                key_walk.copy_all(copies, token_bar.at[slot])
                return 0

            lax.fori_loop(0, part_heads * steps, fetch_tile, 0)

        @pl.when(warpgroup < warpgroups)
        def _compute():
            plgpu.set_max_registers(key_walk.COMPUTE_REGISTERS, action="increase")
            own = (tile * warpgroups + warpgroup) * KEYS
            place = (batch_id, pl.ds(own, KEYS), kv_head)
            k_w = k_s.at[warpgroup]
            v_w = k_w.at[:, pl.ds(0, value_dim)] if shared else v_s.at[warpgroup]
            copies = [(k_ref.at[place], k_w)] + ([] if shared else [(v_ref.at[place], v_w)])
            key_walk.copy_all(copies, key_bar.at[warpgroup])
            first_end = documents.first_end if packed else None
            full_end = end_query(own, document_end(first_end, tile * warpgroups + warpgroup))
            own_begin = lax.div(first_query(own), jnp.int32(width))
            own_begin = jnp.clip(own_begin, begin, end)
            full_begin = first_query(own + (KEYS - 1)) + (width - 1)
            full_begin = jnp.clip(lax.div(full_begin, jnp.int32(width)), own_begin, end)
            full_end = jnp.clip(lax.div(full_end, jnp.int32(width)), full_begin, end)
            key_ids = own + tiles.row_ids(KEYS)
            plgpu.barrier_wait(key_bar.at[warpgroup])
            kept_keys = plgpu.load(k_w.at[:, pl.ds(0, kept)], layout=tiles.LAYOUT)

            def mask(i, scores, start_w):
                token = position(documents, i * width) + tiles.column_ids(KEYS, width)
                seen = token >= tiles.across(key_range.first_token(key_ids), width)
                if key_range.window < NO_WINDOW:
                    end = key_range.end_token(key_ids, position(documents, length))
                    seen &= token < tiles.across(end, width)
                if packed:
                    first_token = tiles.across(key_range.stride * key_ids, width)
                    seen &= _down(start_w) <= first_token
                return jnp.where(seen, scores, -jnp.inf)

            def key_factors(token_w, dim):
                """Returns the factors of the first `dim` numbers of keys and of tokens."""
                num = min(kept, dim)
                left = kept_keys if num == kept else kept_keys[:, :num]
                factors = [(left, tiles.transposed(token_w.at[:, pl.ds(0, num)]))]
                if num < dim:
                    rest = pl.ds(num, dim - num)
                    factors.append((k_w.at[:, rest], tiles.transposed(token_w.at[:, rest])))
                return factors

            def scores_of(i, number, masked):
                """Returns the factors of scores and of dscores, and what makes weights of one."""
                slot = lax.rem(number, jnp.int32(SLOTS))

                def weigh(scores):
                    scores = scores * exponent - _down(lse_s.at[slot])
                    if masked:
                        scores = mask(i, scores, start_s.at[slot] if packed else None)
                    return jnp.exp2(scores)

                def differentiate(weights, dweights):
                    return weights * (dweights * scale - _down(delta_s.at[slot]))

                plgpu.barrier_wait(token_bar.at[slot])
                q_w, do_w = q_s.at[slot], do_s.at[slot]
                value_factors = [(v_w, tiles.transposed(do_w))]
                if shared:
                    value_factors = key_factors(do_w, value_dim)
                return [key_factors(q_w, head_dim), value_factors], weigh, differentiate

            def sums_of_tile(number, weights, dscores):
                """Returns the number of the sum and the factors of every product of a tile."""
                slot = lax.rem(number, jnp.int32(SLOTS))
                q_w, do_w = q_s.at[slot], do_s.at[slot]
                if not shared:
                    return [(0, weights, do_w), (1, dscores, q_w)]
                products = [(0, weights, do_w), (0, dscores, q_w.at[:, pl.ds(0, value_dim)])]
                if rest_dim:
                    products.append((1, dscores, q_w.at[:, pl.ds(value_dim, rest_dim)]))
                return products

            def release(number):
                plgpu.barrier_arrive(free_bar.at[lax.rem(number, jnp.int32(SLOTS))])

            def step(i, number, carry, masked):
                sums, weights, dscores = carry
                sums, weights, dscores = overlap.scores_during_sums(
                    scores_of(i, number, masked),
                    sums,
                    sums_of_tile(number - 1, weights, dscores),
                    interpret,
                )
                release(number - 1)
                return sums, weights.astype(dtype), dscores.astype(dtype)

            def step_alone(i, number, sums, masked):
                _, weights, dscores = overlap.scores_during_sums(
                    scores_of(i, number, masked), (), [], interpret
                )
                products = sums_of_tile(number, weights.astype(dtype), dscores.astype(dtype))
                sums = overlap.add_matmuls(sums, products, interpret)
                release(number)
                return sums

            # Tiles of a head that see the warpgroup's keys; they are its last ones.
            num_seen = end - own_begin

            def walk_back(step, number, carry, num_done):
                """Walks the tiles of a head but the last `num_done`; `number` is of the first."""
                bounds = (jnp.maximum(end - x, num_done) for x in (full_end, full_begin, own_begin))

                def step_of_head(i, carry, masked):
                    return step(end - 1 - i, number + i, carry, masked)

                return key_walk.walk((num_done, *bounds), step_of_head, carry)

            def walk_overlapped(number, sums):
                _, weights, dscores = overlap.scores_during_sums(
                    scores_of(end - 1, number, True), (), [], interpret
                )
                carry = sums, weights.astype(dtype), dscores.astype(dtype)
                sums, weights, dscores = walk_back(step, number, carry, 1)
                last = number + num_seen - 1
                products = sums_of_tile(last, weights, dscores)
                sums = overlap.add_matmuls(sums, products, interpret)
                release(last)
                return sums

            def skip(number, _):
                plgpu.barrier_wait(token_bar.at[lax.rem(number, jnp.int32(SLOTS))])
                release(number)
                return 0

            def walk_head(head, sums):
                number = head * steps
                if sum(sum_dims) <= OVERLAP_DIMS:
                    walk = functools.partial(walk_overlapped, number)
                    sums = lax.cond(num_seen > 0, walk, lambda sums: sums, sums)
                else:
                    sums = walk_back(step_alone, number, sums, 0)
                lax.fori_loop(number + num_seen, number + steps, skip, 0)
                return sums

            zeros = tuple(tiles.zeros((KEYS, dim)) for dim in sum_dims)
            dvalue, *rest = lax.fori_loop(0, part_heads, walk_head, zeros)
            if whole:
                v_w[...] = dvalue.astype(dtype)
                if rest_dim:
                    k_w.at[:, pl.ds(head_dim - rest_dim, rest_dim)][...] = rest[0].astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k_w, dk_ref.at[place])
                if not shared:
                    plgpu.copy_smem_to_gmem(v_w, dv_ref.at[place])
                plgpu.wait_smem_to_gmem(0)
            else:
                (dk_ref if shared else dv_ref).at[part, *place, pl.ds(0, value_dim)][...] = dvalue
                if rest_dim:
                    columns = pl.ds(head_dim - rest_dim, rest_dim)
                    dk_ref.at[part, *place, columns][...] = rest[0]

    def _down(vector_s):
        vector = plgpu.load(vector_s, layout=BY_COLUMN)
        return lax.broadcast_in_dim(vector, (KEYS, width), [1])

    def sums_of(array):
        if array is None:
            return None
        shape = array.shape if whole else (parts, *array.shape)
        return jax.ShapeDtypeStruct(shape, dtype if whole else jnp.float32)

    # Operands of one product need one swizzle, no wider than a tile of tokens.
    like_key = tiles.transforms(math.gcd(head_dim, width), dtype)
    like_value = like_key if shared else tiles.transforms(math.gcd(value_dim, width), dtype)
    scratch: dict[str, Any] = {
        "q_s": plgpu.SMEM((SLOTS, width, head_dim), dtype, transforms=like_key),
        "do_s": plgpu.SMEM((SLOTS, width, value_dim), dtype, transforms=like_value),
        "k_s": plgpu.SMEM((warpgroups, KEYS, head_dim), dtype, transforms=like_key),
        "v_s": None
        if shared
        else plgpu.SMEM((warpgroups, KEYS, value_dim), dtype, transforms=like_value),
        "lse_s": plgpu.SMEM((SLOTS, width), jnp.float32),
        "delta_s": plgpu.SMEM((SLOTS, width), jnp.float32),
        "start_s": plgpu.SMEM((SLOTS, width), jnp.int32) if packed else None,
        "key_bar": plgpu.Barrier(num_barriers=warpgroups, num_arrivals=2 - shared),
        "token_bar": plgpu.Barrier(num_barriers=SLOTS, num_arrivals=4 + packed),
        "free_bar": plgpu.Barrier(num_barriers=SLOTS, num_arrivals=warpgroups),
    }
    dkey, dvalue = plgpu.kernel(
        body,
        kernel_name=name,
        out_type=(sums_of(key), sums_of(value)),
        grid=(batch, num_keys // (warpgroups * KEYS), num_kv_heads, parts),
        grid_names=("batch", "tile", "kv_head", "part"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=key_walk.PARAMETERS,
        interpret=interpret,
    )(query, key, value, doutput, lse, delta, documents)
    if whole:
        return dkey, dvalue
    return jax.tree.map(lambda sums: sums.sum(0).astype(dtype), (dkey, dvalue))
