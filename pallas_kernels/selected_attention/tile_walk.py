"""The walk of a tile of queries over its keys, forward and for the query's gradient.

A warpgroup owns a tile of 64 rows (query tokens times heads of one key head) and walks the union of
the lists of its groups, 64 keys a step: one block of 64 or four of 16, gathered side by side by the
copy engine while earlier keys are worked on. Of wide keys it is 32 a step, since their sums leave
registers for no more. A row whose group did not choose a block gets -inf for its scores. Entries
ascend, so only the last steps can hold keys after a query.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.masked_attention import from_rows, to_rows
from pallas_kernels.mosaic import tiles
from pallas_kernels.mosaic.tiles import ROWS
from pallas_kernels.selected_attention.lists import MEMBER_BITS

KEYS = 64  # keys of a step at most
COPY_LIMIT = 256  # numbers along an axis that one copy takes
TILED_ROWS = 8  # shared memory is tiled by so many rows: the least that a copy can take


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static about a call.

    Rows are query tokens times heads of a key head, as matrices [B * T * K * heads, w]: by token,
    as the caller has them, where the heads of a key head are enough for a copy; else by key head,
    which costs transposes.
    """

    num_tokens: int
    num_kv_heads: int
    heads: int  # query heads of a key head, padded
    block_size: int
    queries_per_selection: int
    scale: float
    is_wide: bool = False  # whether the sums of a tile are half of the registers or more
    interpret: Any = None

    @property
    def rows_per_group(self) -> int:
        return self.queries_per_selection * self.heads

    @property
    def groups_per_tile(self) -> int:
        return ROWS // self.rows_per_group

    @property
    def tokens_per_tile(self) -> int:
        return ROWS // self.heads

    @property
    def num_tiles(self) -> int:
        return self.num_tokens // self.tokens_per_tile

    @property
    def keys_per_step(self) -> int:
        return KEYS // 2 if self.is_wide else KEYS

    @property
    def blocks_per_step(self) -> int:
        return self.keys_per_step // self.block_size

    @property
    def causal_steps(self) -> int:
        """The last steps of a tile, which may hold blocks that the tile's own tokens lie in."""
        own_blocks = pl.cdiv(self.tokens_per_tile, self.block_size)
        return 1 + pl.cdiv(own_blocks - 1, self.blocks_per_step)

    @property
    def scale2(self) -> float:
        return self.scale * tiles.LOG2E

    def buffer(self, shape: tuple[int, ...], dtype: Any, like_width: int | None = None) -> Any:
        """See `tiles.tiled`; no wider than the keys of a step, which are rows of a factor."""
        like_width = math.gcd(like_width or shape[-1], self.keys_per_step)
        return tiles.tiled(shape, dtype, like_width=like_width)

    @property
    def sums_by_key(self) -> bool:
        """Whether the keys of a block are enough to be the rows of the sums of their gradients."""
        return self.block_size == ROWS

    @property
    def is_by_token(self) -> bool:
        return self.heads % TILED_ROWS == 0

    def to_rows(self, array: jax.Array) -> jax.Array:
        """Lays out [B, T, N, w] as rows."""
        rows = array if self.is_by_token else to_rows(array, self.num_kv_heads)
        return rows.reshape(-1, array.shape[-1])

    def from_rows(self, rows: jax.Array) -> jax.Array:
        """Undoes `to_rows`."""
        lead = (-1, self.num_tokens, self.num_kv_heads * self.heads)
        if self.is_by_token:
            return rows.reshape(*lead, rows.shape[-1])
        by_head = rows.reshape(-1, self.num_kv_heads, self.num_tokens * self.heads, rows.shape[-1])
        return from_rows(by_head, self.num_tokens)

    def first_row(self, batch: Any, head: Any, token: Any) -> Any:
        """The row of a token's first head."""
        if self.is_by_token:
            place = (batch * self.num_tokens + token) * self.num_kv_heads + head
        else:
            place = (batch * self.num_kv_heads + head) * self.num_tokens + token
        return place * self.heads

    def rows_per_copy(self, num_rows: int, ref: Any, buffer: Any) -> int:
        """How many of `num_rows` rows, from a token's first, go from or to shared memory at once.

        A part of the columns of a buffer is contiguous only in rows that are tiled together.
        """
        if ref.shape[-1] != buffer.shape[-1]:
            return TILED_ROWS
        return self.heads if self.is_by_token else num_rows

    def copies(
        self, ref: Any, buffer: Any, batch: Any, head: Any, token: Any
    ) -> Iterator[tuple[Any, Any]]:
        """Pairs of neighbouring rows, from a token's first, in memory and in a shared buffer.

        Args:
          ref: Rows.
          buffer: The same rows in shared memory; its first columns where it is wider.
          batch: Row of the batch.
          head: Key head.
          token: The first token.
        """
        num_rows = buffer.shape[0]
        size = self.rows_per_copy(num_rows, ref, buffer)
        for row in range(0, num_rows, size):
            first = self.first_row(batch, head, token + row // self.heads) + row % self.heads
            piece = buffer.at[pl.ds(row, size)]
            if ref.shape[-1] != buffer.shape[-1]:
                piece = piece.at[:, pl.ds(0, ref.shape[-1])]
            yield ref.at[pl.ds(pl.multiple_of(first, TILED_ROWS), size)], piece


class TileWalk:
    """What the forward kernel and the one for the query's gradient share: the walk of a tile."""

    def __init__(
        self,
        problem: Problem,
        query_offset: Any,
        entries: Any,
        arrays: Any,
        buffers: Any,
        barriers: Any,
    ):
        self.problem, self.entries, self.arrays = problem, entries, arrays
        self.buffers, self.barriers = buffers, barriers
        self.num_stages = buffers[0].shape[0]
        self.batch, self.head, tile = (lax.axis_index(x) for x in ("batch", "head", "tile"))
        self.tile = problem.num_tiles - 1 - tile  # the longest first: the last to end are short
        row = tiles.row_ids()
        self.group = lax.div(row, jnp.int32(problem.rows_per_group))
        first = self.tile * problem.tokens_per_tile
        if query_offset is not None:
            first = query_offset[0] + first
        self.token = first + lax.div(row, jnp.int32(problem.heads))
        self.column = tiles.column_ids(ROWS, problem.block_size)

    @property
    def statistics(self) -> Any:
        """The rows of the tile in an array [B, K, T * heads]."""
        return self.batch, self.head, pl.ds(self.tile * ROWS, ROWS)

    def load(self, ref: Any, buffer: Any, barrier: Any) -> None:
        """Starts the copies of the tile's rows into shared memory."""
        token = self.tile * self.problem.tokens_per_tile
        for source, target in self.problem.copies(ref, buffer, self.batch, self.head, token):
            plgpu.copy_gmem_to_smem(source, target, barrier)

    def store(self, buffer: Any, ref: Any) -> None:
        """Starts the copies of the tile's rows from shared memory."""
        token = self.tile * self.problem.tokens_per_tile
        for target, source in self.problem.copies(ref, buffer, self.batch, self.head, token):
            plgpu.copy_smem_to_gmem(source, target)

    def fetch(self, step: jax.Array) -> None:
        """Starts the copies of the keys (and values) of a step into their stage."""
        problem, stage = self.problem, lax.rem(step, jnp.int32(self.num_stages))
        for i in range(problem.blocks_per_step):
            block = self.entries[step * problem.blocks_per_step + i] >> MEMBER_BITS
            source = pl.ds(block * problem.block_size, problem.block_size)
            target = pl.ds(i * problem.block_size, problem.block_size)
            for array, buffer in zip(self.arrays, self.buffers, strict=True):
                plgpu.copy_gmem_to_smem(
                    array.at[self.batch, source, self.head],
                    buffer.at[stage, target],
                    self.barriers.at[stage],
                )

    def start(self, num_steps: jax.Array) -> None:
        for i in range(self.num_stages):
            pl.when(i < num_steps)(functools.partial(self.fetch, jnp.int32(i)))

    def wait(self, step: jax.Array) -> list[Any]:
        """Waits for the keys (and values) of a step and returns their buffers."""
        stage = lax.rem(step, jnp.int32(self.num_stages))
        plgpu.barrier_wait(self.barriers.at[stage])
        return [buffer.at[stage] for buffer in self.buffers]

    def refill(self, step: jax.Array, num_steps: jax.Array) -> None:
        ahead = step + self.num_stages
        pl.when(ahead < num_steps)(lambda: self.fetch(ahead))

    def scores(
        self, step: jax.Array, products: jax.Array, addend: jax.Array, causal: bool
    ) -> jax.Array:
        """Scores in base 2, plus a number a row; -inf for the keys that the row does not see."""
        problem, size, pieces = self.problem, self.problem.block_size, []
        for i in range(problem.blocks_per_step):
            entry = self.entries[step * problem.blocks_per_step + i]
            bias = jnp.where((entry >> self.group) & 1 == 1, addend, -jnp.inf)
            piece = products[:, i * size : (i + 1) * size] * problem.scale2
            piece += tiles.across(bias, size)
            if causal:
                last = self.token - (entry >> MEMBER_BITS) * size
                piece = jnp.where(self.column <= tiles.across(last, size), piece, -jnp.inf)
            pieces.append(piece)
        return jnp.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]

    def weights(
        self, step: jax.Array, products: jax.Array, maximum: jax.Array, causal: bool
    ) -> tuple[jax.Array, jax.Array]:
        """The maximum of the scores in base 2 so far, and exp2(scores - maximum)."""
        scale2, num_keys = self.problem.scale2, self.problem.keys_per_step
        if self.problem.blocks_per_step > 1 or scale2 <= 0:
            scores = self.scores(step, products, jnp.zeros_like(maximum), causal)
            maximum = jnp.maximum(maximum, scores.max(axis=1))
            return maximum, jnp.exp2(scores - tiles.across(maximum, num_keys))
        # One block: all of a row counts or nothing, so numbers of the row do the masking.
        entry = self.entries[step]
        if causal:
            last = self.token - (entry >> MEMBER_BITS) * num_keys
            products = jnp.where(self.column <= tiles.across(last, num_keys), products, -jnp.inf)
        is_member = (entry >> self.group) & 1 == 1
        largest = jnp.where(is_member, products.max(axis=1) * scale2, -jnp.inf)
        maximum = jnp.maximum(maximum, largest)
        offset = jnp.where(is_member, maximum, jnp.inf)
        return maximum, jnp.exp2(products * scale2 - tiles.across(offset, num_keys))

    def run(self, num_steps: jax.Array, step: Any, carry: Any) -> Any:
        """Calls `step(index, carry, causal)` for every step."""
        first_causal = jnp.maximum(num_steps - self.problem.causal_steps, 0)
        carry = lax.fori_loop(0, first_causal, functools.partial(step, causal=False), carry)
        return lax.fori_loop(first_causal, num_steps, functools.partial(step, causal=True), carry)


def copy_list(entries_ref: Any, entries_buffer: Any, barrier: Any) -> None:
    """Starts the copies of a list into shared memory."""
    for start in range(0, entries_ref.shape[0], COPY_LIMIT):
        piece = pl.ds(start, min(COPY_LIMIT, entries_ref.shape[0] - start))
        plgpu.copy_gmem_to_smem(entries_ref.at[piece], entries_buffer.at[piece], barrier)


def num_list_copies(length: int) -> int:
    return -(-length // COPY_LIMIT)


def steps_of(problem: Problem, count: jax.Array) -> jax.Array:
    """Steps for so many entries."""
    return lax.div(count + (problem.blocks_per_step - 1), jnp.int32(problem.blocks_per_step))
