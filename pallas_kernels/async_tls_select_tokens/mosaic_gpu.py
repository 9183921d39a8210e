"""async_tls_select_tokens on Hopper GPUs: two kernels read labels, a third lists the largest.

A program takes some blocks of a list. Tokens are the rows of a tile, query heads its columns; the
codes become bfloat16 in registers, exactly, and are a factor of the tensor cores there. The first
kernel finds the log-sum-exp of its part for each head; the second computes the scores again, from
labels that the L2 cache still holds, and with the log-sum-exp of all parts sums the weights over
heads, along a row. Writing the scores of all heads and reading them would move more bytes.
"""

# mypy: disable-error-code="no-untyped-def"

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.async_tls_select_tokens.reference import Labels
from pallas_kernels.mosaic import gather, largest_columns, tiles
from pallas_kernels.mosaic.decode import COPY_ROWS
from pallas_kernels.mosaic.key_walk import MULTIPROCESSORS
from pallas_kernels.mosaic.largest_columns import COLUMNS, KEPT, MAX_COLUMNS, NEVER
from pallas_kernels.mosaic.tiles import ROWS
from pallas_kernels.token_lists import MAX_KEPT_BLOCKS, competing_blocks

PROGRAMS = 2 * MULTIPROCESSORS
BLOCKS_OF_PROGRAM = (16, 8, 4, 2, 1)
LISTED_MULTIPLE = COLUMNS // ROWS  # of the entries of a list, padded
HALVES = 2  # of a byte of codes


@dataclasses.dataclass(frozen=True)
class Split:
    """How lists are dealt to programs.

    Attributes:
      num_listed: Entries of a list.
      each: Entries of a program.
    """

    num_listed: int
    each: int

    @property
    def count(self) -> int:
        """Programs of a list; a list padded to whole ones is padded to whole `COLUMNS`."""
        return (self.num_listed + -self.num_listed % max(LISTED_MULTIPLE, self.each)) // self.each


def split_of(num_rows: int, num_listed: int) -> Split:
    """Chooses the most entries of a program with which every multiprocessor has several.

    What a program does to a block is a chain of short steps, each of which waits for the one
    before; other programs fill the gaps.

    Args:
      num_rows: Rows of the batch times key heads.
      num_listed: Entries of a list.
    """
    padded = num_listed + -num_listed % LISTED_MULTIPLE
    splits = [Split(num_listed, each) for each in BLOCKS_OF_PROGRAM if padded % each == 0]
    return next((s for s in splits if num_rows * s.count >= PROGRAMS), splits[-1])


# Compiled by itself, so that layers of the same sizes are lowered once.
@functools.partial(
    jax.jit, static_argnames=("token_budget", "block_size", "scale", "each", "interpret")
)
def async_tls_select_tokens(
    query: jax.Array,
    labels: Labels,
    block_indices: jax.Array,
    lengths: jax.Array,
    token_budget: int,
    block_size: int,
    scale: float,
    places: jax.Array | None = None,
    *,
    each: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See `api.async_tls_select_tokens`; `each` and `interpret` are for tests.

    Raises:
      NotImplementedError: The kernels cannot take the call.
    """
    check_supported(query, labels, block_indices, block_size)
    weights = token_weights(
        query, labels, block_indices, lengths, scale, each=each, interpret=interpret
    )
    places = block_indices if places is None else places
    return largest_columns.largest_columns(
        weights, places.astype(jnp.int32), num_columns=block_indices.shape[2] * block_size,
        size=token_budget, max_kept=MAX_KEPT_BLOCKS * block_size, block_size=block_size,
        interpret=interpret,
    )  # fmt: skip


def check_supported(
    query: jax.Array,
    labels: Labels,
    block_indices: jax.Array,
    block_size: int,
    max_columns: int = MAX_COLUMNS,
) -> None:
    """Raises NotImplementedError, naming the value, for what the kernels do not take."""
    if block_size != ROWS:
        raise NotImplementedError(f"block_size: {block_size}, the kernel takes {ROWS}")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"query: {query.dtype}, the kernel takes bfloat16 and float16")
    num_kv_heads, num_tokens, num_bytes = labels.codes.shape[1:]
    if num_bytes not in (16, 32, 64, 128):
        raise NotImplementedError(f"labels: {2 * num_bytes} channels, not 32, 64, 128 or 256")
    if num_tokens % ROWS:
        raise NotImplementedError(f"labels: {num_tokens} tokens, not a multiple of {ROWS}")
    if any(x.dtype != jnp.float16 for x in (labels.step, labels.zero)):
        raise NotImplementedError("labels: step and zero are not float16")
    if (group := query.shape[1] // num_kv_heads) > ROWS:
        raise NotImplementedError(f"query: {group} heads of one key head are over {ROWS}")
    if (num_columns := block_indices.shape[2] * ROWS) > max_columns:
        raise NotImplementedError(f"block_indices: {num_columns} tokens are over {max_columns}")


@functools.partial(jax.jit, static_argnames=("scale", "each", "interpret"))
def token_weights(
    query: jax.Array,
    labels: Labels,
    block_indices: jax.Array,
    lengths: jax.Array,
    scale: float,
    *,
    each: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Weights of tokens of listed blocks, as `largest_columns` takes them.

    Returns:
      float32 [B, K, C], C at least the tokens of the lists; anything behind these.
    """
    batch, num_kv_heads, num_listed = block_indices.shape
    split = split_of(batch * num_kv_heads, num_listed)
    split = split if each is None else Split(num_listed, each)
    group = query.shape[1] // num_kv_heads
    arrays = (_halves(query, num_kv_heads), *labels, block_indices.astype(jnp.int32),
              lengths.astype(jnp.int32))  # fmt: skip
    call = functools.partial(
        _call, arrays, split=split, group=group, exponent=scale * tiles.LOG2E, interpret=interpret
    )
    lse = call(None)
    return call(lse).reshape(batch, num_kv_heads, -1)


def _halves(query: jax.Array, num_kv_heads: int) -> jax.Array:
    """Arranges queries [B, N, r] as [B, K, 2, G, r / 2], G padded to what a copy takes."""
    batch, _, num_channels = query.shape
    halves = query.reshape(batch, num_kv_heads, -1, HALVES, num_channels // HALVES).swapaxes(2, 3)
    return jnp.pad(halves, ((0, 0), (0, 0), (0, 0), (0, -halves.shape[3] % COPY_ROWS), (0, 0)))


def _call(arrays, lse, *, split: Split, group: int, exponent: float, interpret: Any) -> jax.Array:
    """Log-sum-exp of each split, [B, K, splits or more, G or more] base 2, or weights given it."""
    query, codes = arrays[:2]
    batch, num_kv_heads = codes.shape[:2]
    rows, num_bytes = query.shape[3:]
    each = split.each

    def body(
        q_ref, codes_ref, step_ref, zero_ref, entries_ref, lengths_ref, lse_ref, result_ref, *,
        q_s, codes_s, step_s, zero_s, result_s, bar,
    ):  # fmt: skip
        batch_id, program, head = (lax.axis_index(name) for name in ("batch", "split", "head"))
        place, length = (batch_id, head), lengths_ref[batch_id]

        def block_of(i):
            """The i-th block of this program, -1 for none."""
            index = program * each + i
            listed = entries_ref[*place, jnp.minimum(index, split.num_listed - 1)]
            return jnp.where(index < split.num_listed, listed, -1)

        plgpu.copy_gmem_to_smem(q_ref.at[place], q_s, bar)
        for source_ref, target_s in ((codes_ref, codes_s), (step_ref, step_s), (zero_ref, zero_s)):
            source, first = source_ref.at[place], program * each
            entries = entries_ref.at[place]
            gather.copy_blocks(entries, first, source, target_s, interpret=interpret)
        gather.commit_gathers(interpret=interpret)
        plgpu.barrier_wait(bar)
        gather.wait_gathers(0, interpret=interpret)
        plgpu.commit_smem()
        tile = _LabelTile(q_s, codes_s, step_s, zero_s, exponent, interpret)
        if lse_ref is None:
            result_s[...] = _log_sum_exp(tile, block_of, length)
            target = result_ref.at[*place, program]
        else:
            of_heads = _merged(lse_ref.at[place], split.count)

            def weigh(i, _):
                result_s[i] = _weights(tile, i, block_of(i), length, of_heads, group)

            lax.fori_loop(0, each, weigh, None)
            target = result_ref.at[*place, pl.ds(program * each, each)]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result_s, target)
        plgpu.wait_smem_to_gmem(0)

    result_shape: tuple[int, ...] = (split.count * each, ROWS)
    of_program: tuple[int, ...] = (each, ROWS)
    if lse is None:
        result_shape, of_program = (split.count + -split.count % ROWS, rows), (rows,)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, num_kv_heads, *result_shape), jnp.float32),
        kernel_name="async_tls_label_lse" if lse is None else "async_tls_label_weights",
        grid=(batch, split.count, num_kv_heads),
        grid_names=("batch", "split", "head"),
        num_threads=1,  # reductions over warps of several warpgroups would share their scratch
        thread_name="warpgroup",
        scratch_types={
            "q_s": tiles.tiled((HALVES, rows, num_bytes), query.dtype),
            "codes_s": plgpu.SMEM((each, ROWS, num_bytes), jnp.uint8),
            "step_s": plgpu.SMEM((each, ROWS), jnp.float16),
            "zero_s": plgpu.SMEM((each, ROWS), jnp.float16),
            "result_s": plgpu.SMEM(of_program, jnp.float32),
            "bar": plgpu.Barrier(num_arrivals=1),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*arrays, lse)


@dataclasses.dataclass
class _LabelTile:
    """Scores of the tokens of a block, by the labels that are in shared memory."""

    query: Any  # [2, G, r / 2]
    codes: Any  # [blocks, 64, r / 2]
    step: Any  # [blocks, 64]
    zero: Any  # [blocks, 64]
    exponent: float
    interpret: Any

    def __post_init__(self) -> None:
        shape = self.codes.shape[1:]
        ones = plgpu.layout_cast(jnp.ones(shape, self.query.dtype), tiles.LAYOUT)
        self.query_sums = self._product((ones,) * HALVES)

    def scores(self, i: Any) -> jax.Array:
        """Scores [64, G] of block i in base 2."""
        pairs = plgpu.load(self.codes.at[i], layout=tiles.LAYOUT, optimized=False)
        pairs = pairs.astype(jnp.int32)
        halves = (pairs & 15, lax.shift_right_logical(pairs, 4))
        products = self._product([x.astype(jnp.float32).astype(self.query.dtype) for x in halves])
        step, zero = (self._by_token(ref.at[i]) for ref in (self.step, self.zero))
        return (step * products + zero * self.query_sums) * self.exponent

    def _product(self, halves: Any) -> jax.Array:
        queries = (tiles.transposed(self.query.at[half]) for half in range(HALVES))
        return tiles.matmul(*zip(halves, queries, strict=True), interpret=self.interpret)

    def _by_token(self, ref: Any) -> jax.Array:
        numbers = plgpu.load(ref, layout=tiles.BY_ROW, optimized=False)
        return tiles.across(numbers.astype(jnp.float32), self.query.shape[1])


def _log_sum_exp(tile: _LabelTile, block_of: Callable[[Any], Any], length: Any) -> jax.Array:
    """Log-sum-exp in base 2 of the scores of tokens that compete, of each head."""

    def step(i, carry):
        maximum, total = carry
        competes, _ = competing_blocks(block_of(i), length, ROWS)
        scores = tile.scores(i) + jnp.where(competes, 0.0, -jnp.inf)
        higher = jnp.maximum(maximum, scores)
        total = total * jnp.exp2(maximum - higher) + jnp.exp2(scores - higher)
        return higher, total

    nothing = tiles.zeros((ROWS, tile.query.shape[1]))
    carry = nothing + tiles.NO_MAXIMUM, nothing
    return _over_rows(*lax.fori_loop(0, tile.codes.shape[0], step, carry))


def _merged(lse_ref: Any, count: int) -> jax.Array:
    """Log-sum-exp of all splits, of each head, from [splits or more, G]."""
    lse = plgpu.load(lse_ref, layout=tiles.LAYOUT, optimized=False)
    row = plgpu.broadcasted_iota(jnp.int32, lse.shape, 0, layout=tiles.LAYOUT)
    lse = jnp.where(row < count, jnp.maximum(lse, tiles.NO_MAXIMUM), tiles.NO_MAXIMUM)
    return _over_rows(lse, tiles.zeros(lse.shape) + 1)


def _over_rows(maximum: jax.Array, total: jax.Array) -> jax.Array:
    """log2 sum exp2(maximum) total over the rows of a tile."""
    highest = maximum.max(axis=0)
    shares = total * jnp.exp2(maximum - lax.broadcast_in_dim(highest, maximum.shape, [1]))
    return highest + jnp.log2(shares.sum(axis=0))


def _weights(
    tile: _LabelTile, i: Any, block: Any, length: Any, lse: jax.Array, group: int
) -> jax.Array:
    """Weights [64] of the tokens of block i, summed over heads, or `KEPT` or `NEVER`."""
    scores = tile.scores(i)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(lse, scores.shape, [1]))
    weights = jnp.where(tiles.column_ids(*scores.shape) < group, weights, 0.0).sum(axis=1)
    competes, kept = competing_blocks(block, length, ROWS)
    token = tiles.row_ids()  # blocks that compete lie wholly before the tail
    others = jnp.where(token < jnp.where(kept, length - block * ROWS, 0), KEPT, NEVER)
    return jnp.where(token < jnp.where(competes, ROWS, 0), weights, others)
