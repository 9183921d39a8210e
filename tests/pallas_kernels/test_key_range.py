"""Arithmetic of ranges of keys against loops over tokens and keys."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic.key_range import NO_WINDOW, KeyRange, documents
from pallas_kernels.mosaic.key_walk import Items
from tests.pallas_kernels.flash_checks import packed_row

RANGES = [
    KeyRange(window=1),
    KeyRange(window=70),
    KeyRange(),
    KeyRange(16, 16),
    KeyRange(32, 16),
    KeyRange(64, 16),
]
LENGTH = 192


def visible(key_range: KeyRange, starts: np.ndarray, num_keys: int) -> np.ndarray:
    """Which keys [S] each token [T] sees, by the definition."""
    token, key = np.arange(LENGTH)[:, None], key_range.stride * np.arange(num_keys)
    seen = (key + key_range.block_size - 1 <= token) & (key >= starts[:, None])
    return seen & (key > token - key_range.window)


@pytest.mark.parametrize("key_range", RANGES, ids=str)
def test_range_of_a_token_holds_what_it_sees(key_range: KeyRange) -> None:
    num_keys = LENGTH // key_range.stride
    starts = np.where(np.arange(LENGTH) < 100, 0, 64)
    tokens = jnp.arange(LENGTH)
    first = key_range.first_key(tokens, jnp.asarray(starts))[:, None]
    end = key_range.end_key(tokens)[:, None]
    keys = jnp.arange(num_keys)
    wanted = visible(key_range, starts, num_keys)
    chex.assert_trees_all_equal(np.asarray((first <= keys) & (keys < end)), wanted)


@pytest.mark.parametrize("key_range", RANGES, ids=str)
def test_range_of_a_key_holds_what_sees_it(key_range: KeyRange) -> None:
    num_keys = LENGTH // key_range.stride
    keys, tokens = jnp.arange(num_keys), jnp.arange(LENGTH)[:, None]
    first, end = key_range.first_token(keys), key_range.end_token(keys, LENGTH)
    wanted = visible(key_range, np.zeros(LENGTH, int), num_keys)
    chex.assert_trees_all_equal(np.asarray((first <= tokens) & (tokens < end)), wanted)


def test_nothing_overflows_at_the_longest_row() -> None:
    last = jnp.int32(2**20 - 1)
    assert KeyRange().first_key(last, 0) == 0
    assert KeyRange().end_token(last, 2**20) == 2**20
    assert last + NO_WINDOW > 0


@pytest.mark.parametrize("stride", [1, 16])
def test_documents_bound_tiles_of_tokens_and_keys(stride: int) -> None:
    length, num_keys = 512, 512 // stride // 64 * 64 or 64
    row = packed_row(length)
    found = documents(row, length, num_keys, stride, None)
    segments = np.asarray(row[0])
    starts = [
        next(s for s in range(t + 1) if (segments[s : t + 1] == segments[t]).all())
        if segments[t]
        else length
        for t in range(length)
    ]
    tiles = np.reshape(starts, (-1, 64))
    chex.assert_trees_all_equal(np.asarray(found.start[0]), np.array(starts, np.int32))
    chex.assert_trees_all_equal(np.asarray(found.earliest_start[0]), tiles.min(1).astype(np.int32))
    chex.assert_trees_all_equal(np.asarray(found.latest_start[0]), tiles.max(1).astype(np.int32))
    for ends, offset in ((found.first_end, 0), (found.last_end, 63)):
        for tile, end in enumerate(np.asarray(ends[0])):
            token = min(stride * (64 * tile + offset), length - 1)
            assert (segments[token:end] == segments[token]).all()
            assert end == length or segments[end] != segments[token]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 7), (2, 3, 50)])
def test_every_item_is_dealt_once(sizes: tuple[int, int, int]) -> None:
    batch, num_heads, num_tiles = sizes
    items = Items(*sizes)
    dealt = [
        tuple(int(x) for x in items.item(jnp.int32(program), jnp.int32(n)))
        for program in range(items.num_programs)
        for n in range(int(items.num_of(jnp.int32(program))))
    ]
    every = np.ndindex(batch, num_tiles, num_heads)
    assert sorted(dealt) == sorted(every)
