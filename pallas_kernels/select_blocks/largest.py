"""Mosaic GPU kernel of `select_blocks` that lists the blocks with the largest scores.

A warpgroup holds a row of scores in registers. Scores are not negative, so that their bits order as
integers: it bisects for the value of the last place on the list, counting the scores above, and
with ties once more, for the last column that is on it. The chosen columns become words of 32 bits,
each the sum of a bit a lane. Thread i of a warp then looks for the i-th bit that is set among its
warp's words; what it finds in one of the four warps is entry i.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

MAX_LIST = 128
WARPS, LANES = 4, 32
# Of [n, 4, 32] scores: a quarter of the columns in each warp, neighbours in its lanes.
SCORES = plgpu.Layout.TILED(
    plgpu.Tiling(((1, WARPS, LANES), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
# Of [4, n] entries of a list: all in each warp, spread over its lanes.
ENTRIES = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, LANES), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
FIRST_REACH, MOST_REACH = 2**22, 2**30  # in bits of a float, whose exponent counts 2**23 each


def largest(
    scores: jax.Array,
    own: jax.Array,
    first: jax.Array,
    kept: jax.Array | None = None,
    *,
    size: int,
    interpret: Any,
) -> jax.Array:
    """Lists the first block, the own one, the one before, and in the places left the best between.

    Args:
      scores: float32 [B, K, M, n, 4, 32], at least 0 where a block competes; [..., i, w, l] is that
        of block (w * n + i) * 32 + l, so that a warp has neighbouring blocks.
      own: int32 [B, M], own blocks, below the number of columns; -1 for an empty list.
      first: int32 [B, M], first blocks of their documents.
      kept: int32 [B, M, K, L], lists in the place of empty ones, which then take no time.
      size: L, 3 .. `MAX_LIST`.
      interpret: Parameters of interpret mode, for tests.

    Returns:
      int32 [B, M, K, L], ascending, then -1; equal scores go to the lower index.
    """
    batch, num_kv_heads, num_rows, num_words = scores.shape[:4]  # words of a warp
    words_shape = (num_words + -num_words % LANES, WARPS)
    width = size + -size % LANES
    if kept is not None:
        kept = jnp.pad(kept, ((0, 0), (0, 0), (0, 0), (0, width - size)), constant_values=-1)

    def body(
        scores_ref: Any, own_ref: Any, first_ref: Any, kept_ref: Any, lists_ref: Any, *,
        words_s: Any, counts_s: Any, totals_s: Any, list_s: Any, kept_bar: Any,
    ) -> None:  # fmt: skip
        batch_id, head, row = (lax.axis_index(name) for name in ("batch", "head", "row"))
        own, first = own_ref[batch_id, row], first_ref[batch_id, row]

        def choose() -> None:
            word, warp, lane = (
                plgpu.broadcasted_iota(jnp.int32, scores.shape[3:], axis, layout=SCORES)
                for axis in range(3)
            )
            column = (warp * num_words + word) * LANES + lane
            values = plgpu.load(scores_ref.at[batch_id, head, row], layout=SCORES, optimized=False)
            values = jnp.where((column > first) & (column < own - 1), values, -1.0)
            given = jnp.maximum(jnp.minimum(own - first + 1, 3), 0)
            least, last_tie = search(values, column, own - first - 2, size - given)

            chosen = (values > least) | ((values == least) & (column <= last_tie))
            chosen |= (column == own) | (column == own - 1) | (column == first)
            chosen &= (first <= column) & (column <= own)
            words_s[pl.ds(0, num_words)] = jnp.where(chosen, jnp.int32(1) << lane, 0).sum(axis=2)
            totals_s[...] = count_by_warp(chosen)
            plgpu.commit_smem()
            in_threads = plgpu.Layout.WG_STRIDED(words_shape, 1)
            counts_s[...] = count_bits(plgpu.load(words_s, layout=in_threads))
            plgpu.commit_smem()
            list_s[...] = set_bits(words_s, counts_s, totals_s, num_words, width)
            plgpu.commit_smem()

        def keep() -> None:
            plgpu.copy_gmem_to_smem(kept_ref.at[batch_id, row, head], list_s, kept_bar)
            plgpu.barrier_wait(kept_bar)

        if kept is None:
            choose()
        else:
            pl.when(own >= 0)(choose)
            pl.when(own < 0)(keep)
        plgpu.copy_smem_to_gmem(list_s, lists_ref.at[batch_id, row, head])
        plgpu.wait_smem_to_gmem(0)

    scratch: dict[str, Any] = {
        "words_s": plgpu.SMEM(words_shape, jnp.int32),
        "counts_s": plgpu.SMEM(words_shape, jnp.int32),
        "totals_s": plgpu.SMEM((WARPS,), jnp.int32),
        "list_s": plgpu.SMEM((width,), jnp.int32),
        "kept_bar": plgpu.Barrier() if kept is not None else None,
    }
    lists = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, num_rows, num_kv_heads, width), jnp.int32),
        kernel_name="select_blocks_largest",
        grid=(batch, num_kv_heads, num_rows),
        grid_names=("batch", "head", "row"),
        num_threads=1,  # reductions over warps of several warpgroups would share their scratch
        thread_name="warpgroup",
        scratch_types=scratch,
        interpret=interpret,
    )(scores, own, first, kept)
    return lists[..., :size]


def count_by_warp(where: jax.Array) -> jax.Array:
    """Counts True in [n, 4, 32], int32 [4]."""
    # In float32, exact here: Hopper adds floats at twice the rate of integers.
    return jnp.where(where, 1.0, 0.0).sum(axis=0).astype(jnp.int32).sum(axis=1)


def search(
    values: jax.Array, column: jax.Array, num_competing: jax.Array, places: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the least value of a list, and the last column with that value that is on it.

    Args:
      values: float32, a row; -1 where a block does not compete.
      column: int32, the column of each value.
      num_competing: How many values are at least 0.
      places: How many are wanted.
    """

    def as_floats(bits: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(jnp.broadcast_to(bits, values.shape), jnp.float32)

    def narrow(state: Any) -> Any:
        low, high, at_low, reach = state  # count(value >= low) >= places > count(value >= high)
        # The value wanted is near the largest: look there first, and twice as far each time.
        middle = jnp.maximum(low + lax.shift_right_logical(high - low, 1), high - reach)
        at_middle = count_by_warp(values >= as_floats(middle)).sum()
        enough = at_middle >= places
        exact = at_middle == places  # then any value up to the next one will do
        return (
            jnp.where(enough, middle, low),
            jnp.where(exact, middle + 1, jnp.where(enough, high, middle)),
            jnp.where(enough, at_middle, at_low),
            2 * jnp.minimum(reach, MOST_REACH // 2),
        )

    most = lax.bitcast_convert_type(values, jnp.int32).max(axis=0).max(axis=1).max()
    high = jnp.where(num_competing > places, most + 1, 1)
    least_bits, _, at_least, _ = lax.while_loop(
        lambda state: state[1] - state[0] > 1,
        narrow,
        (jnp.int32(0), high, num_competing, jnp.int32(FIRST_REACH)),
    )
    least = as_floats(least_bits)

    def narrow_ties(state: Any) -> Any:
        low, high = state
        middle = lax.shift_right_logical(low + high, 1)
        listed = (values > least) | ((values == least) & (column <= middle))
        enough = count_by_warp(listed).sum() >= places
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    last_column = jnp.int32(values.size - 1)
    low = jnp.where(at_least > places, 0, last_column)
    last_tie, _ = lax.while_loop(lambda state: state[0] < state[1], narrow_ties, (low, last_column))
    return least, last_tie


def set_bits(
    words_ref: Any, counts_ref: Any, totals_ref: Any, num_words: int, width: int
) -> jax.Array:
    """Returns the positions of the bits that are set, int32 [width], ascending, then -1.

    Args:
      words_ref: [n, 4] words; those of a warp follow one another.
      counts_ref: [n, 4] their numbers of bits.
      totals_ref: [4] the sums of these.
      num_words: How many of the n there are.
      width: Length of the result.
    """
    shape = (WARPS, width)
    of_warp = ENTRIES.reduce(1)
    warp = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=ENTRIES)
    rank = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ENTRIES)  # of the bit, from this word
    for earlier in range(WARPS - 1):
        rank = rank - jnp.where(warp > earlier, totals_ref[earlier], 0)

    def look(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rank, bits, rank_in_word, index = state
        word, count = (
            lax.broadcast_in_dim(plgpu.load(ref.at[i], layout=of_warp), shape, [0])
            for ref in (words_ref, counts_ref)
        )
        found = (rank >= 0) & (rank < count)
        return (
            rank - count,
            jnp.where(found, word, bits),
            jnp.where(found, rank, rank_in_word),
            jnp.where(found, i, index),
        )

    nothing = rank * 0
    state = (rank, nothing, nothing, nothing)
    _, bits, rank, index = lax.fori_loop(0, num_words, look, state)
    position = (warp * num_words + index) * LANES
    found = bits != 0
    for half in (16, 8, 4, 2, 1):
        low_bits = count_bits(bits & ((1 << half) - 1))
        is_high = rank >= low_bits
        bits = jnp.where(is_high, lax.shift_right_logical(bits, half), bits)
        rank = jnp.where(is_high, rank - low_bits, rank)
        position = jnp.where(is_high, position + half, position)
    return jnp.where(found, position + 1, 0).sum(axis=0) - 1


def count_bits(words: jax.Array) -> jax.Array:
    """Counts the bits set by sums of ever wider fields; Mosaic GPU has no population count."""
    shift = lax.shift_right_logical
    pairs = words - (shift(words, 1) & 0x55555555)
    fours = (pairs & 0x33333333) + (shift(pairs, 2) & 0x33333333)
    bytes_ = (fours + shift(fours, 4)) & 0x0F0F0F0F
    return shift(bytes_ * 0x01010101, 24)
