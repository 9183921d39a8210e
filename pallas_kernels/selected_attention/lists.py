"""Lists that the kernels walk: blocks of each tile of queries, and queries of each block.

A tile is `groups_per_tile` neighbouring groups of queries. It walks the union of their lists once,
each entry a block with the set of groups that chose it, so that a block which neighbours share is
fetched once. The gradient of the keys walks the inverse: for each block the groups that chose it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.blocks import of_queries

MEMBER_BITS = 8  # an entry is block << MEMBER_BITS | set of the groups of the tile that chose it
COPY_WORDS = 32  # lists are padded to 128 bytes, which copies into shared memory must be
NONE = np.iinfo(np.int32).max  # sorts after every entry


def clean_lists(
    block_indices: jax.Array,
    segment_ids: jax.Array | None,
    block_size: int,
    queries_per_selection: int,
    query_offset: jax.Array | int | None = None,
) -> jax.Array:
    """Returns the lists [B, K, M, L] with -1 for what no query of the group may count.

    That is: no block, a block listed before, one that starts after the group, and one of another
    document. What is left is causal but for the group's own block.

    Args:
      block_indices: int [B, M, K, L].
      segment_ids: int of all tokens of the row, which ends with a whole block and not before the
        last group, or None.
      block_size: Tokens of a block.
      queries_per_selection: Queries of a group.
      query_offset: int32 [], position in the row of the first query; None = they are the row.
    """
    lists = block_indices.astype(jnp.int32).swapaxes(1, 2)
    num_groups, length = lists.shape[2:]
    own = jnp.arange(num_groups, dtype=jnp.int32)[:, None] * queries_per_selection // block_size
    if query_offset is not None:
        own += query_offset // block_size
    earlier = jnp.tril(jnp.ones((length, length), bool), -1)
    repeated = ((lists[..., :, None] == lists[..., None, :]) & earlier).any(-1)
    counts = (lists >= 0) & (lists <= own) & ~repeated
    if segment_ids is not None:
        block_segments = segment_ids[:, None, None, ::block_size]
        num_queries = num_groups * queries_per_selection
        query_segments = of_queries(segment_ids, num_queries, query_offset)
        group_segments = query_segments[:, None, ::queries_per_selection, None]
        segments = jnp.take_along_axis(block_segments, jnp.maximum(lists, 0), axis=3, mode="clip")
        counts &= (segments == group_segments) & (group_segments > 0)
    return jnp.where(counts, lists, -1)


def union_lists(lists: jax.Array, groups_per_tile: int) -> tuple[jax.Array, jax.Array]:
    """Merges the lists of the groups of each tile.

    Args:
      lists: int32 [B, K, M, L] of `clean_lists`.
      groups_per_tile: A power of two, at most MEMBER_BITS, that divides M.

    Returns:
      Entries int32 [B, K, tiles, E], ascending blocks, then zeros (block 0 without members), and
      the number of blocks int32 [B, K, tiles].
    """
    *lead, num_groups, length = lists.shape
    tiles = lists.reshape(*lead, num_groups // groups_per_tile, groups_per_tile * length)
    member = np.repeat(np.arange(groups_per_tile, dtype=np.int32), length)
    keys = jnp.sort(jnp.where(tiles < 0, NONE, tiles * groups_per_tile + member), axis=-1)
    blocks, members = keys // groups_per_tile, 1 << keys % groups_per_tile
    union = members
    for distance in range(1, groups_per_tile):  # a block occurs at most once for each group
        same = blocks == _shifted(blocks, -distance, fill=-1)
        union += jnp.where(same, _shifted(members, -distance, fill=0), 0)
    is_entry = (keys < NONE) & (blocks != _shifted(blocks, 1, fill=-1))
    entries = jnp.where(is_entry, blocks << MEMBER_BITS | union, NONE)
    if groups_per_tile > 1:
        entries = jnp.sort(entries, axis=-1)
    entries = jnp.where(entries == NONE, 0, entries)
    padding = [(0, 0)] * (entries.ndim - 1) + [(0, -entries.shape[-1] % COPY_WORDS)]
    return jnp.pad(entries, padding), is_entry.sum(-1, dtype=jnp.int32)


def _shifted(array: jax.Array, distance: int, fill: int) -> jax.Array:
    """Moves the last axis by `distance` places."""
    moved = jnp.roll(array, distance, axis=-1)
    place = jnp.arange(array.shape[-1]) - distance
    return jnp.where((place >= 0) & (place < array.shape[-1]), moved, fill)


@dataclasses.dataclass(frozen=True)
class Cells:
    """Numbering of cells (range of groups, key head of a row, block), ranges outermost.

    A block is chosen by groups of its own range or of later ones, so range i has cells for the
    blocks of ranges 0 .. i only. Where the groups stand in the row is not known if they are a part
    of it (blocks_per_range None): then every range has cells for all blocks.
    """

    num_heads: int  # B * K
    num_groups: int
    num_blocks: int
    groups_per_range: int
    blocks_per_range: int | None

    @property
    def num_ranges(self) -> int:
        return -(-self.num_groups // self.groups_per_range)

    def blocks_of(self, index):  # type: ignore[no-untyped-def]
        """Blocks with a cell in range `index`, an int or an array of them."""
        if self.blocks_per_range is None:
            return self.num_blocks
        return jnp.minimum(self.num_blocks, (index + 1) * self.blocks_per_range)

    def first_of(self, index):  # type: ignore[no-untyped-def]
        """The first cell of range `index`."""
        if self.blocks_per_range is None:
            return self.num_heads * self.num_blocks * index
        return self.num_heads * self.blocks_per_range * (index * (index + 1) // 2)

    def range_of(self, cell: jax.Array) -> jax.Array:
        """The range of cells [X]."""
        later = self.first_of(np.arange(1, self.num_ranges, dtype=np.int32))
        return (cell[:, None] >= later).sum(1, dtype=jnp.int32)

    def first_range_of(self, block):  # type: ignore[no-untyped-def]
        """The first range with a cell for a block."""
        if self.blocks_per_range is None:
            return 0
        return lax.div(block, jnp.int32(self.blocks_per_range))

    @property
    def count(self) -> int:
        last = self.num_ranges - 1
        return self.first_of(last) + self.num_heads * self.num_blocks


class InverseLists(NamedTuple):
    """The groups that chose each block, cut in items of work."""

    groups: jax.Array  # int32 [entries and padding], ordered by cell, then ascending
    items: jax.Array  # int32 [items * 4]: head of a row, block, start in `groups`, length
    first_item: jax.Array  # int32 [cells + 1]: the items of a cell are neighbours


def inverse_lists(lists: jax.Array, cells: Cells, groups_per_item: int) -> InverseLists:
    """Inverts the lists [B, K, M, L] of `clean_lists`.

    Items of one range of groups come together: what runs at the same time then reads queries from
    the same range, which the L2 cache holds.
    """
    num_groups = lists.shape[2]
    group = jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    which = group // cells.groups_per_range
    head = jnp.arange(cells.num_heads, dtype=jnp.int32).reshape(*lists.shape[:2], 1, 1)
    cell = cells.first_of(which) + head * cells.blocks_of(which) + lists
    cell = jnp.where(lists < 0, cells.count, cell)
    cell, groups = _sorted_pairs(cell, group % cells.groups_per_range, cells)
    boundaries = jnp.arange(cells.count + 1, dtype=jnp.int32)
    starts = jnp.searchsorted(cell, boundaries, method="scan_unrolled").astype(jnp.int32)
    lengths = jnp.diff(starts)
    num_items = jnp.cumsum(-(-lengths // groups_per_item), dtype=jnp.int32)
    first_item = jnp.pad(num_items, (1, 0))
    item = jnp.arange(cells.count + cell.size // groups_per_item, dtype=jnp.int32)
    of_cell = jnp.searchsorted(first_item, item, side="right", method="scan_unrolled") - 1
    of_cell = jnp.clip(of_cell, 0, cells.count - 1).astype(jnp.int32)
    offset = (item - first_item[of_cell]) * groups_per_item
    length = jnp.clip(lengths[of_cell] - offset, 0, groups_per_item)
    length = jnp.where(item < first_item[-1], length, 0)
    which = cells.range_of(of_cell)
    head, block = jnp.divmod(of_cell - cells.first_of(which), cells.blocks_of(which))
    items = jnp.stack([head, block, starts[of_cell] + offset, length], axis=-1)
    return InverseLists(jnp.pad(groups, (0, MEMBER_BITS)), items.reshape(-1), first_item)


def _sorted_pairs(cell: jax.Array, group: jax.Array, cells: Cells) -> tuple[jax.Array, jax.Array]:
    """Sorts by cell, then group in its range; as one number where both fit in 32 bits."""
    bits = (cells.groups_per_range - 1).bit_length()
    if (cells.count + 1) << bits > 2**32:
        group = jnp.broadcast_to(group, cell.shape)
        cell, group = lax.sort((cell.reshape(-1), group.reshape(-1)), num_keys=2)
    else:
        packed = cell.astype(jnp.uint32) << bits | group.astype(jnp.uint32)
        packed = jnp.sort(packed.reshape(-1))
        group = (packed & ((1 << bits) - 1)).astype(jnp.int32)
        cell = (packed >> bits).astype(jnp.int32)
    return cell, group + cells.range_of(cell) * cells.groups_per_range
