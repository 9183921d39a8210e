"""The lists that the Mosaic GPU kernels of selected_attention walk."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selected_attention import lists


def dense_lists(block_lists: np.ndarray, num_blocks: int) -> np.ndarray:
    """Which blocks [.., M, blocks] the lists [.., M, L] hold."""
    return (np.asarray(block_lists)[..., None] == np.arange(num_blocks)).any(-2)


def test_clean_lists_drops_what_does_not_count() -> None:
    segment_ids = jnp.array([[1] * 32 + [2] * 24 + [0] * 8])
    rows = [[0, 0, 3, -1], [1, 0, 1, 2], [2, 1, 0, 3], [3, 2, 1, -1]]
    block_indices = jnp.array(rows)[None, :, None]  # one group of 16 queries for each block
    cleaned = lists.clean_lists(block_indices, segment_ids, 16, 16)
    wanted = [[0, -1, -1, -1], [1, 0, -1, -1], [2, -1, -1, -1], [3, 2, -1, -1]]
    chex.assert_trees_all_equal(cleaned, jnp.array(wanted)[None, None])


def test_clean_lists_of_a_part_are_those_of_the_row() -> None:
    segment_ids = jnp.array([[1] * 32 + [2] * 24 + [0] * 8])
    block_indices = jnp.array([[[[i % 4, (i + 1) % 4, 1]] for i in range(16)]])
    whole = lists.clean_lists(block_indices, segment_ids, 16, 4)
    part = lists.clean_lists(block_indices[:, 4:9], segment_ids, 16, 4, jnp.int32(16))
    chex.assert_trees_all_equal(part, whole[:, :, 4:9])


@pytest.mark.parametrize("groups_per_tile", [1, 2, 4, 8])
def test_union_lists_hold_every_choice_once(groups_per_tile: int) -> None:
    rng = np.random.default_rng(groups_per_tile)
    num_blocks, num_groups = 20, 16
    chosen = rng.random((2, 3, num_groups, num_blocks)) < 0.3
    block_lists = np.where(chosen, np.arange(num_blocks), -1)
    entries, counts = lists.union_lists(jnp.asarray(block_lists), groups_per_tile)
    found = np.zeros_like(chosen)
    for batch, head, tile in np.ndindex(*counts.shape):
        row = np.asarray(entries[batch, head, tile])
        blocks, members = row >> lists.MEMBER_BITS, row % (1 << lists.MEMBER_BITS)
        count = int(counts[batch, head, tile])
        assert (np.diff(blocks[:count]) > 0).all()
        assert (row[count:] == 0).all()
        for group in range(groups_per_tile):
            mine = blocks[:count][members[:count] >> group & 1 == 1]
            found[batch, head, tile * groups_per_tile + group, mine] = True
    np.testing.assert_array_equal(found, chosen)


@pytest.mark.parametrize(("groups_per_range", "offset"), [(8, 0), (16, 0), (64, 0), (16, 12)])
def test_inverse_lists_hold_every_choice_once(groups_per_range: int, offset: int) -> None:
    rng = np.random.default_rng(groups_per_range)
    num_groups, num_blocks, groups_per_block, limit = 40, 10, 4, 5
    own = (offset + np.arange(num_groups))[:, None] // groups_per_block
    num_blocks += offset // groups_per_block
    chosen = (rng.random((2, 3, num_groups, num_blocks)) < 0.6) & (np.arange(num_blocks) <= own)
    block_lists = jnp.asarray(np.where(chosen, np.arange(num_blocks), -1))
    cells = lists.Cells(
        num_heads=6,
        num_groups=num_groups,
        num_blocks=num_blocks,
        groups_per_range=groups_per_range,
        blocks_per_range=None if offset else groups_per_range // groups_per_block,
    )
    inverse = lists.inverse_lists(block_lists, cells, limit)
    found = np.zeros_like(chosen).reshape(6, num_groups, num_blocks)
    first = np.asarray(inverse.first_item)
    items = np.asarray(inverse.items).reshape(-1, 4)
    for cell in range(cells.count):
        which = max(i for i in range(cells.num_ranges) if cells.first_of(i) <= cell)
        place = cell - cells.first_of(which)
        head, block = divmod(place, int(cells.blocks_of(which)))
        for item in range(first[cell], first[cell + 1]):
            assert tuple(items[item, :2]) == (head, block)
            start, length = items[item, 2:]
            assert 0 < length <= limit
            groups = np.asarray(inverse.groups[start : start + length])
            assert (groups // groups_per_range == which).all()
            assert not found[head, groups, block].any()
            found[head, groups, block] = True
    np.testing.assert_array_equal(found, chosen.reshape(found.shape))
    assert (items[first[-1] :, 3] == 0).all()
