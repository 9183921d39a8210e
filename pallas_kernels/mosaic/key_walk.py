"""The walk of 64 tokens a warpgroup over the tiles of keys that they see.

Warpgroups of neighbouring tokens share the tiles, which one more warpgroup fetches into a ring.
Only the outer tiles of the walk need a mask; it is traced with and without. Programs stay on their
multiprocessors and walk for one item after another, a tile of tokens of a head each.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import key_range, tiles
from pallas_kernels.mosaic.key_range import NO_WINDOW, Documents, KeyRange

SLOTS = 2  # of the ring
NARROW = 192  # numbers of a key; of wider ones tiles are half as many, and queries in memory only
MULTIPROCESSORS = 132  # of an H100 or H200; where there are fewer, some programs start late
COMPUTE_REGISTERS, FETCH_REGISTERS = 240, 24  # a thread; together at most 3 * 168 for three
TILE_REGISTERS = 208  # of those that compute, for tiles; with more in them the compiler spills
PARAMETERS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)


def walk(bounds: tuple[Any, Any, Any, Any], step: Callable[..., Any], carry: Any) -> Any:
    """Runs carry = step(i, carry, masked) over begin .. end, masked outside full_begin .. full_end.

    Args:
      bounds: begin, full_begin, full_end, end.
      step: The step.
      carry: Its first carry.
    """
    begin, full_begin, full_end, end = bounds
    masked, full = (functools.partial(step, masked=flag) for flag in (True, False))
    carry = lax.fori_loop(begin, full_begin, masked, carry)
    carry = lax.fori_loop(full_begin, full_end, full, carry)
    return lax.fori_loop(full_end, end, masked, carry)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots in shared memory for tiles, which are numbered as they come.

    Attributes:
      source: Reference from which they come.
      slots: Buffer, one tile a slot.
      full: Barriers, one a slot, for one copy each.
      free: Barriers, one a slot, at which every warpgroup that reads arrives.
    """

    source: Any
    slots: Any
    full: Any
    free: Any

    def fetch(self, number: Any, place: Any) -> None:
        """Starts the copy of a tile from a place, once its slot is free."""
        num_slots = self.slots.shape[0]
        slot = self._slot(number)
        pl.when(number >= num_slots)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        plgpu.copy_gmem_to_smem(self.source.at[place], self.slots.at[slot], self.full.at[slot])

    def wait(self, number: Any) -> Any:
        """Returns a tile once it is there; every warpgroup does this once for each."""
        plgpu.barrier_wait(self.full.at[self._slot(number)])
        return self.tile(number)

    def tile(self, number: Any) -> Any:
        """Returns a tile that is there."""
        return self.slots.at[self._slot(number)]

    def release(self, number: Any) -> None:
        """Frees the slot of a tile."""
        plgpu.barrier_arrive(self.free.at[self._slot(number)])

    def _slot(self, number: Any) -> Any:
        return lax.rem(number, jnp.int32(self.slots.shape[0]))


@dataclasses.dataclass(frozen=True)
class Items:
    """What is dealt to programs, those with most keys first.

    Attributes:
      batch: B.
      num_heads: N.
      num_tiles: Tiles of tokens of a row.
    """

    batch: int
    num_heads: int
    num_tiles: int

    @property
    def num_programs(self) -> int:
        """Programs that run at a time."""
        return min(self._count, MULTIPROCESSORS)

    def num_of(self, program: Any) -> Any:
        """Returns how many items a program has."""
        return lax.div(self._count - 1 - program, jnp.int32(self.num_programs)) + 1

    def item(self, program: Any, n: Any) -> tuple[Any, Any, Any]:
        """Returns row of the batch, tile and head of item n of a program."""
        index = program + n * self.num_programs
        tile = self.num_tiles - 1 - lax.div(index, jnp.int32(self.batch * self.num_heads))
        batch_id = lax.rem(lax.div(index, jnp.int32(self.num_heads)), jnp.int32(self.batch))
        return batch_id, tile, lax.rem(index, jnp.int32(self.num_heads))

    @property
    def _count(self) -> int:
        return self.batch * self.num_heads * self.num_tiles


@dataclasses.dataclass(frozen=True)
class KeyWalk:
    """What a program of `warpgroups` * 64 tokens walks; sizes are static, the rest int32 scalars.

    Attributes:
      key_range: The keys that a token sees.
      documents: References to the bounds of packed documents, or None.
      num_keys: S, a multiple of `width`.
      width: Keys of a tile.
      warpgroups: Warpgroups that compute.
      batch_id: Row of the batch.
      tile: The program's number along the row.
    """

    key_range: KeyRange
    documents: Documents | None
    num_keys: int
    width: int
    warpgroups: int
    batch_id: Any
    tile: Any

    def first_token(self, warpgroup: Any) -> Any:
        """Returns the first token of a warpgroup, counted from the first query."""
        return (self.tile * self.warpgroups + warpgroup) * tiles.ROWS

    def first_position(self, warpgroup: Any) -> Any:
        """Returns its position in the row."""
        return key_range.position(self.documents, self.first_token(warpgroup))

    def range(self) -> tuple[Any, Any]:
        """Returns the first tile of keys that some token of the program sees, and the end.

        There is always one, if only to be masked: so a kernel can treat the first one apart.
        """
        earliest: Any = 0
        if self.documents is not None:
            of_tiles = self.documents.earliest_start
            starts = (
                of_tiles[self.batch_id, self.tile * self.warpgroups + i]
                for i in range(self.warpgroups)
            )
            earliest = functools.reduce(jnp.minimum, starts)
        last = jnp.int32(self.num_keys // self.width)
        begin = self.key_range.first_key(self.first_position(0), earliest)
        begin = jnp.minimum(lax.div(begin, jnp.int32(self.width)), last - 1)
        end = self._tiles(self.key_range.end_key(self.first_position(self.warpgroups) - 1))
        return begin, jnp.clip(end, begin + 1, last)

    def bounds(self, warpgroup: Any) -> tuple[Any, Any, Any, Any]:
        """Returns the range with, inside it, that of the tiles which all tokens see wholly."""
        first = self.first_position(warpgroup)
        latest: Any = 0
        if self.documents is not None:
            latest = self.documents.latest_start[
                self.batch_id, self.tile * self.warpgroups + warpgroup
            ]
        begin, end = self.range()
        full_begin = self._tiles(self.key_range.first_key(first + (tiles.ROWS - 1), latest))
        full_begin = jnp.clip(full_begin, begin, end)
        full_end = lax.div(self.key_range.end_key(first), jnp.int32(self.width))
        return begin, full_begin, jnp.clip(full_end, full_begin, end), end

    def fetch(self, rings: list["Ring"], kv_head: Any, count: Any) -> Any:
        """Copies the tiles of the range to rings that had `count` before; returns the new count."""
        begin, end = self.range()

        def fetch_tile(i: Any, _: Any) -> Any:
            rows = pl.ds(i * self.width, self.width)
            for ring in rings:
                ring.fetch(count + i - begin, (self.batch_id, rows, kv_head))
            return 0

        lax.fori_loop(begin, end, fetch_tile, 0)
        return count + end - begin

    def mask(self, warpgroup: Any, start_s: Any) -> Callable[[Any, jax.Array], jax.Array]:
        """Returns f(i, scores), which sets to -inf those of tile i that a token does not see."""
        start: Any = 0
        if self.documents is not None:
            start = plgpu.load(start_s, layout=tiles.BY_ROW)
        tokens = self.first_position(warpgroup) + tiles.row_ids()
        first_key = self.key_range.first_key(tokens, start)
        end_key = self.key_range.end_key(tokens)
        from_first = self.documents is None and self.key_range.window >= NO_WINDOW

        def apply(i: Any, scores: jax.Array) -> jax.Array:
            column = tiles.column_ids(tiles.ROWS, self.width)
            seen = column < tiles.across(end_key - i * self.width, self.width)
            if not from_first:
                seen &= column >= tiles.across(first_key - i * self.width, self.width)
            return jnp.where(seen, scores, -jnp.inf)

        return apply

    def _tiles(self, keys: Any) -> Any:
        return lax.div(keys + (self.width - 1), jnp.int32(self.width))


def fetch_items(
    num_items: Any,
    item: Callable[[Any], tuple[Any, KeyWalk]],
    copies: Callable[[KeyWalk, Any, int], list[tuple[Any, Any]]],
    rings: list[Ring],
    group: int,
    token_bar: Any,
    read_bar: Any,
) -> None:
    """Fetches for every item of a program what its warpgroups own, then its tiles of keys.

    Args:
      num_items: Of the program.
      item: Of a number, the query head and the walk.
      copies: Of a walk, a head and a warpgroup, what this one owns.
      rings: Of keys and, where these are apart, of values.
      group: Query heads of a key head.
      token_bar: Barriers, one a warpgroup, at which its copies arrive.
      read_bar: Barriers, one a warpgroup, at which it arrives when there is room for the next ones.
    """

    def fetch_item(n: Any, count: Any) -> Any:
        head, keys = item(n)
        for w in range(keys.warpgroups):
            pl.when(n > 0)(functools.partial(plgpu.barrier_wait, read_bar.at[w]))
            copy_all(copies(keys, head, w), token_bar.at[w])
        return keys.fetch(rings, lax.div(head, jnp.int32(group)), count)

    lax.fori_loop(0, num_items, fetch_item, jnp.int32(0))


def copy_all(copies: list[tuple[Any, Any]], barrier: Any) -> None:
    """Starts copies to shared memory, all of which arrive at one barrier."""
    for source, destination in copies:
        plgpu.copy_gmem_to_smem(source, destination, barrier)
