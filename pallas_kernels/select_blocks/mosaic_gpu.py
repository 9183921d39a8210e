"""select_blocks on Hopper GPUs: a kernel that scores blocks and one that picks the largest scores.

Only blocks between the first of the document and the one before the query's compete, the others of
a list being given. Every compressed block that shares tokens with a competitor is complete at the
query and in its document, so that the scores need no mask.

Scores: a tile has the first queries of 64 groups on its rows and blocks on its columns, and loops
over the heads of a key head, importance += weight * exp2(c q . k - lse), so that the sum over
heads never leaves the registers. Compressed blocks that overlap the same selection block in the
same way ("taps") are a tile of keys each, so that pooling is a sum over taps.

Choice: scores are not negative, so that their bits order as integers. A warpgroup holds a row in
registers and bisects for the count-th largest value; with ties it bisects again, for the last
column that belongs to the list. The chosen columns become words of 32 bits, one sum over the lanes
of a warp each, and thread i of the warpgroup looks for the i-th bit that is set.

Rows are worked on in ranges, so that neither memory nor time is spent on what lies far above the
diagonal, and a range in chunks, so that scores never take more than `MAX_SCORES`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import blocks
from pallas_kernels.mosaic import tiles

MAX_SCORES = 2**26  # float32 numbers in memory at a time
FIRST_COLUMNS = 512  # of the first range; each next one has twice as many
SLOTS = 2  # tiles of queries that are fetched ahead
MAX_LIST = 128  # one entry a thread
WORD = 32  # columns, one a lane
PLANE = 4 * WORD  # columns, one a thread of the warpgroup
# Of a plane seen as [4, 32]: a row in each warp, a column in each lane.
BY_WARP = plgpu.Layout.TILED(
    plgpu.Tiling(((4, WORD), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)


class Tap(NamedTuple):
    """How compressed block `offset` + j * blocks per selection block counts for block j."""

    offset: int
    weight: float


class Problem(NamedTuple):
    """Sizes and constants of a call.

    Attributes:
      group: G, query heads of a key head.
      exponent: Factor of the scores in base 2.
      taps: Compressed blocks that overlap a selection block.
      list_size: L.
      interpret: Parameters of interpret mode, for tests.
    """

    group: int
    exponent: float
    taps: tuple[Tap, ...]
    list_size: int
    interpret: Any

    @property
    def key_tile(self) -> int:
        """Columns of a tile of scores; all its taps must fit in shared memory, twice."""
        return 128 if len(self.taps) == 1 else 64


def select_blocks(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array,
    num_selected_blocks: int,
    block_size: int,
    compression_block_size: int,
    compression_stride: int,
    queries_per_selection: int,
    segment_ids: jax.Array | None,
    scale: float,
    *,
    interpret: Any = None,
) -> jax.Array:
    """See `api.select_blocks`.

    Raises:
      NotImplementedError: The kernels do not take this type or size.
    """
    check_supported(query, key, num_selected_blocks)
    if compression_block_size - compression_stride > block_size:
        raise NotImplementedError(
            f"compression_block_size {compression_block_size}: more than block_size {block_size} "
            f"+ compression_stride {compression_stride}"
        )
    batch, length, num_heads, head_dim = query.shape
    num_groups = pl.cdiv(length, queries_per_selection)
    num_blocks = pl.cdiv(length, block_size)
    per_block = block_size // compression_stride
    problem = Problem(
        num_heads // key.shape[2],
        scale * tiles.LOG2E,
        overlaps(block_size, compression_block_size, compression_stride),
        num_selected_blocks,
        interpret,
    )

    padded = num_groups + -num_groups % tiles.ROWS
    query = pad_axis1(query, 0, padded * queries_per_selection - length)
    query = query.reshape(batch, padded, queries_per_selection, num_heads, head_dim)
    key = tapped_keys(key, problem, num_blocks, per_block)
    lse = pad_axis1(lse[:, ::queries_per_selection] * tiles.LOG2E, 0, padded - num_groups)
    lse = lse.reshape(batch, padded, key.shape[3], problem.group).transpose(0, 2, 3, 1)
    own, first = block_bounds(segment_ids, batch, length, queries_per_selection, block_size)
    own = pad_axis1(own, 0, padded - num_groups, -1)
    first = pad_axis1(first, 0, padded - num_groups, num_blocks)

    lists = []
    begin = 0
    for num_columns in column_ranges(num_blocks):
        end = min(num_columns * block_size // queries_per_selection, padded)
        lists.append(select_range(query, key, lse, own, first, begin, end, num_columns, problem))
        begin = end
    return jnp.concatenate(lists, axis=1)[:, :num_groups]


def check_supported(query: jax.Array, key: jax.Array, num_selected_blocks: int) -> None:
    """Raises NotImplementedError unless the kernels take arrays and lists like these."""
    if query.dtype not in (jnp.bfloat16, jnp.float16) or key.dtype != query.dtype:
        raise NotImplementedError(f"query {query.dtype}, key {key.dtype}: not both 16 bits")
    head_dim = query.shape[-1]
    if head_dim % 32 or head_dim > 256:
        raise NotImplementedError(f"head dim {head_dim}: not a multiple of 32 up to 256")
    if not 3 <= num_selected_blocks <= MAX_LIST:
        raise NotImplementedError(f"num_selected_blocks {num_selected_blocks}: not 3 .. {MAX_LIST}")
    if 0 in query.shape or 0 in key.shape:
        raise NotImplementedError(f"query {query.shape}, key {key.shape}: empty")


def overlaps(block_size: int, compression_block_size: int, stride: int) -> tuple[Tap, ...]:
    """Compressed blocks that share tokens with a selection block; see `reference`."""
    num_before = pl.cdiv(compression_block_size, stride) - 1
    taps = []
    for offset in range(num_before + block_size // stride):
        first = (offset - num_before) * stride
        shared = min(block_size, first + compression_block_size) - max(0, first)
        taps.append(Tap(offset, shared / stride))
    return tuple(taps)


def pad_axis1(array: jax.Array, before: int, after: int, fill: int = 0) -> jax.Array:
    """Pads axis 1; the array itself where there is nothing to pad."""
    padding = [(0, 0)] * array.ndim
    padding[1] = (before, after)
    return jnp.pad(array, padding, constant_values=fill) if before or after else array


def tapped_keys(key: jax.Array, problem: Problem, num_blocks: int, per_block: int) -> jax.Array:
    """Arranges the keys of each tap in the order of selection blocks: [B, taps, blocks, K, H]."""
    num_before = len(problem.taps) - per_block
    num_rows = num_blocks + -num_blocks % problem.key_tile
    end = num_rows * per_block
    key = pad_axis1(key, num_before, end - key.shape[1])
    taps = [key[:, tap.offset : tap.offset + end : per_block] for tap in problem.taps]
    return jnp.stack(taps, axis=1)


def block_bounds(
    segment_ids: jax.Array | None, batch: int, length: int, step: int, block_size: int
) -> tuple[jax.Array, jax.Array]:
    """Own block (-1 for padding) and first block of the document of each group, int32 [B, M]."""
    positions = blocks.token_positions(length)[:, ::step]
    visible_from = blocks.visible_from(segment_ids, length)[:, ::step]
    own = jnp.where(visible_from <= positions, positions // block_size, -1)
    shape = (batch, own.shape[1])
    return jnp.broadcast_to(own, shape), jnp.broadcast_to(visible_from // block_size, shape)


def column_ranges(num_blocks: int) -> list[int]:
    """Numbers of columns of the ranges of rows: a row is in the first that holds its own block."""
    most = num_blocks + -num_blocks % PLANE
    columns = [FIRST_COLUMNS]
    while columns[-1] < most:
        columns.append(2 * columns[-1])
    return [*columns[:-1], most]


def select_range(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array,
    own: jax.Array,
    first: jax.Array,
    begin: int,
    end: int,
    num_columns: int,
    problem: Problem,
) -> jax.Array:
    """Lists of the groups begin .. end - 1, whose own blocks are below num_columns."""
    batch, num_kv_heads = lse.shape[:2]
    most = max(tiles.ROWS, MAX_SCORES // (batch * num_kv_heads * num_columns))
    num_rows = end - begin
    while num_rows > most and num_rows % (2 * tiles.ROWS) == 0:
        num_rows //= 2

    def select_chunk(start: jax.Array) -> jax.Array:
        here = functools.partial(
            lax.dynamic_slice_in_dim, start_index=start, slice_size=num_rows, axis=1
        )
        bounds = here(own), here(first)
        scores = importance(query, key, lse, *bounds, start, num_columns, problem)
        return largest(scores, *bounds, problem)

    if num_rows == end - begin:
        return select_chunk(jnp.int32(begin))
    lists = lax.map(select_chunk, jnp.arange(begin, end, num_rows, dtype=jnp.int32))
    return jnp.moveaxis(lists, 0, 1).reshape(batch, end - begin, num_kv_heads, problem.list_size)


def importance(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array,
    own: jax.Array,
    first: jax.Array,
    start: jax.Array,
    num_columns: int,
    problem: Problem,
) -> jax.Array:
    """Scores of blocks; only those that compete for a place on some list are computed.

    Args:
      query: [B, rows, queries_per_selection, N, H].
      key: As `tapped_keys` returns it.
      lse: Base 2, [B, K, G, rows].
      own: [B, rows of this chunk] own blocks.
      first: [B, rows of this chunk] first blocks of their documents.
      start: First row of this chunk.
      num_columns: Columns of the result.
      problem: Sizes of the call.

    Returns:
      float32 [B, K, rows of this chunk, num_columns].
    """
    batch, num_kv_heads, group, _ = lse.shape
    head_dim = key.shape[-1]
    num_rows, key_tile, taps = own.shape[1], problem.key_tile, problem.taps
    of_tile = (batch, num_rows // tiles.ROWS, tiles.ROWS)
    last_own, least_first = own.reshape(of_tile).max(-1), first.reshape(of_tile).min(-1)
    num_chunks = min(pl.cdiv(num_columns, key_tile), key.shape[2] // key_tile)

    def body(
        q_ref, k_ref, lse_ref, start_ref, last_ref, first_ref, scores_ref, *,
        q_s, k_s, lse_s, q_bar, k_bar,
    ):  # fmt: skip
        batch_id, head = lax.axis_index("batch"), lax.axis_index("head")
        tile, chunk = lax.axis_index("tile"), lax.axis_index("chunk")
        row, column = start_ref[0] + tile * tiles.ROWS, chunk * key_tile
        competes = (column + 1 < last_ref[batch_id, tile]) & (
            column + key_tile - 1 > first_ref[batch_id, tile]
        )

        def fetch(i):
            slot = lax.rem(i, jnp.int32(SLOTS))
            rows = pl.ds(pl.multiple_of(row, tiles.ROWS), tiles.ROWS)
            plgpu.copy_gmem_to_smem(
                q_ref.at[batch_id, rows, 0, head * group + i], q_s.at[slot], q_bar.at[slot]
            )
            plgpu.copy_gmem_to_smem(
                lse_ref.at[batch_id, head, i, rows], lse_s.at[slot], q_bar.at[slot]
            )

        def add_head(i, sums):
            slot = lax.rem(i, jnp.int32(SLOTS))
            plgpu.barrier_wait(q_bar.at[slot])
            row_lse = tiles.across(plgpu.load(lse_s.at[slot], layout=tiles.BY_ROW), key_tile)
            for number, tap in enumerate(taps):
                scores = tiles.matmul((q_s.at[slot], tiles.transposed(k_s.at[number])))
                sums = sums + tap.weight * jnp.exp2(scores * problem.exponent - row_lse)
            pl.when(i + SLOTS < group)(lambda: fetch(i + SLOTS))
            return sums

        @pl.when(competes)
        def score():
            rows = pl.ds(pl.multiple_of(column, key_tile), key_tile)
            for number in range(len(taps)):
                plgpu.copy_gmem_to_smem(
                    k_ref.at[batch_id, number, rows, head], k_s.at[number], k_bar
                )
            for i in range(min(SLOTS, group)):
                fetch(jnp.int32(i))
            plgpu.barrier_wait(k_bar)
            sums = lax.fori_loop(0, group, add_head, tiles.zeros((tiles.ROWS, key_tile)))
            place = (pl.ds(tile * tiles.ROWS, tiles.ROWS), pl.ds(column, key_tile))
            scores_ref[batch_id, head, *place] = sums

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, num_kv_heads, num_rows, num_columns), jnp.float32),
        grid=(batch, num_kv_heads, num_rows // tiles.ROWS, num_chunks),
        grid_names=("batch", "head", "tile", "chunk"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types={
            "q_s": tiles.tiled((SLOTS, tiles.ROWS, head_dim), query.dtype),
            "k_s": tiles.tiled((len(taps), key_tile, head_dim), key.dtype),
            "lse_s": plgpu.SMEM((SLOTS, tiles.ROWS), jnp.float32),
            "q_bar": plgpu.Barrier(num_barriers=SLOTS, num_arrivals=2),
            "k_bar": plgpu.Barrier(num_arrivals=len(taps)),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=problem.interpret,
    )(query, key, lse, start[None], last_own, least_first)


def largest(scores: jax.Array, own: jax.Array, first: jax.Array, problem: Problem) -> jax.Array:
    """Lists of the given blocks and, in the places left, those of the largest scores.

    Args:
      scores: float32 [B, K, M, columns], at least 0 where a block competes.
      own: [B, M] own blocks, below the number of columns; -1 for an empty list.
      first: [B, M] first blocks of their documents.
      problem: Sizes of the call.

    Returns:
      int32 [B, M, K, L], ascending, then -1; equal scores go to the lower index.
    """
    batch, num_kv_heads, num_rows, num_columns = scores.shape
    num_planes, size = num_columns // PLANE, problem.list_size
    num_words = num_planes * (PLANE // WORD)
    width = size + -size % 4  # copies move multiples of 16 bytes

    def body(scores_ref, own_ref, first_ref, lists_ref, *, words_s, counts_s, list_s):
        batch_id, head, row = (lax.axis_index(name) for name in ("batch", "head", "row"))
        own, first = own_ref[batch_id, row], first_ref[batch_id, row]
        lane = plgpu.broadcasted_iota(jnp.int32, (4, WORD), 1, layout=BY_WARP)
        warp = plgpu.broadcasted_iota(jnp.int32, (4, WORD), 0, layout=BY_WARP)
        columns = [lane + (warp * WORD + i * PLANE) for i in range(num_planes)]

        def bits(i):
            here = plgpu.load(
                scores_ref.at[batch_id, head, row, i], layout=BY_WARP, optimized=False
            )
            competes = (columns[i] > first) & (columns[i] < own - 1)
            return jnp.where(competes, lax.bitcast_convert_type(here, jnp.int32), -1)

        values = [bits(i) for i in range(num_planes)]
        given = jnp.maximum(jnp.minimum(own - first + 1, 3), 0)
        least, last_tie = search(values, columns, own - first - 2, size - given)

        for i, (value, column) in enumerate(zip(values, columns, strict=True)):
            chosen = (value > least) | ((value == least) & (column <= last_tie))
            chosen |= (column == own) | (column == own - 1) | (column == first)
            chosen &= (first <= column) & (column <= own)
            words = jnp.where(chosen, jnp.int32(1) << lane, 0).sum(axis=1)
            words_s[pl.ds(4 * i, 4)] = words
        plgpu.commit_smem()
        counts_s[...] = count_bits(words_s[...])
        plgpu.commit_smem()
        list_s[...] = set_bits(
            lambda i: (words_s[i], counts_s[i]), lax.div(first, WORD), lax.div(own, WORD) + 1
        )
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(list_s.at[pl.ds(0, width)], lists_ref.at[batch_id, row, head])
        plgpu.wait_smem_to_gmem(0)

    word_buffer = plgpu.SMEM((num_words + -num_words % PLANE,), jnp.int32)
    lists = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, num_rows, num_kv_heads, width), jnp.int32),
        grid=(batch, num_kv_heads, num_rows),
        grid_names=("batch", "head", "row"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types={
            "words_s": word_buffer,
            "counts_s": word_buffer,
            "list_s": plgpu.SMEM((MAX_LIST,), jnp.int32),
        },
        interpret=problem.interpret,
    )(scores.reshape(*scores.shape[:3], num_planes, 4, WORD), own, first)
    return lists[..., :size]


def search(
    values: list[jax.Array], columns: list[jax.Array], num_competing: jax.Array, places: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the least value of a list, and the last column with that value that is on it.

    Args:
      values: Integers, planes of a row; -1 where a block does not compete.
      columns: Their columns.
      num_competing: How many values are at least 0.
      places: How many are wanted.
    """

    def count(counts: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        ones = (jnp.where(counts(*pair), 1, 0) for pair in zip(values, columns, strict=True))
        return functools.reduce(jnp.add, ones).sum(axis=1).sum()

    def narrow(state):  # count(low) >= places > count(high)
        low, high, at_low = state
        middle = low + lax.shift_right_logical(high - low, 1)
        at_middle = count(lambda value, _: value >= middle)
        enough = at_middle >= places
        exact = at_middle == places  # then any value up to the next one will do
        return (
            jnp.where(enough, middle, low),
            jnp.where(exact, middle + 1, jnp.where(enough, high, middle)),
            jnp.where(enough, at_middle, at_low),
        )

    most = functools.reduce(jnp.maximum, values).max(axis=1).max()
    high = jnp.where(num_competing > places, most + 1, 1)
    least, _, at_least = lax.while_loop(
        lambda state: state[1] - state[0] > 1, narrow, (jnp.int32(0), high, num_competing)
    )

    def narrow_ties(state):
        low, high = state
        middle = lax.shift_right_logical(low + high, 1)
        number = count(
            lambda value, column: (value > least) | ((value == least) & (column <= middle))
        )
        enough = number >= places
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    last_column = jnp.int32(len(columns) * PLANE - 1)
    low = jnp.where(at_least > places, 0, last_column)
    last_tie, _ = lax.while_loop(lambda state: state[0] < state[1], narrow_ties, (low, last_column))
    return least, last_tie


def set_bits(word: Callable[[jax.Array], tuple], begin: jax.Array, end: jax.Array) -> jax.Array:
    """Positions of the bits that are set, one a thread, ascending, then -1.

    Args:
      word: Returns word i and the number of its bits.
      begin: First word to look at.
      end: One more than the last.
    """
    wanted = plgpu.broadcasted_iota(
        jnp.int32, (MAX_LIST,), 0, layout=plgpu.Layout.WG_STRIDED((MAX_LIST,), 1)
    )

    def look(i, state):
        before, bits, rank, base = state
        here, number = word(i)
        found = (wanted >= before) & (wanted < before + number)
        return (
            before + number,
            jnp.where(found, here, bits),
            jnp.where(found, wanted - before, rank),
            jnp.where(found, i * WORD, base),
        )

    nothing = wanted * 0
    total, bits, rank, position = lax.fori_loop(
        begin, end, look, (jnp.int32(0), nothing, nothing, nothing)
    )
    for half in (16, 8, 4, 2, 1):
        low_bits = count_bits(bits & ((1 << half) - 1))
        is_high = rank >= low_bits
        bits = jnp.where(is_high, lax.shift_right_logical(bits, half), bits)
        rank = jnp.where(is_high, rank - low_bits, rank)
        position = jnp.where(is_high, position + half, position)
    return jnp.where(wanted < total, position, -1)


def count_bits(words: jax.Array) -> jax.Array:
    """Number of bits set, by sums of ever wider fields; Mosaic GPU has no population count."""
    shift = lax.shift_right_logical
    pairs = words - (shift(words, 1) & 0x55555555)
    fours = (pairs & 0x33333333) + (shift(pairs, 2) & 0x33333333)
    bytes_ = (fours + shift(fours, 4)) & 0x0F0F0F0F
    return shift(bytes_ * 0x01010101, 24)
