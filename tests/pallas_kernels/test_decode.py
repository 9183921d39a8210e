"""Decoding over a cache: what the operations on whole rows give for the last token of each."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blocks import number_of_blocks
from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_select_blocks import decode_select_blocks
from pallas_kernels.decode_selected_attention import decode_selected_attention
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.selected_attention import selected_attention
from pallas_kernels.sliding_window_attention import sliding_window_attention

pytestmark = pytest.mark.usefixtures("fast_compilation")

TOKENS = 150
LENGTHS = np.array([1, 15, 16, 17, 33, 97, 98, 150])
ASA = {
    "block_size": 16,
    "compression_block_size": 16,
    "compression_stride": 16,
    "queries_per_selection": 4,
}
NSA = {**ASA, "block_size": 64, "compression_block_size": 32, "queries_per_selection": 1}


def draw(num_heads: int, num_kv_heads: int, width: int, value_dim: int, rope_dim: int):
    """A query for every token of rows that are alike, and a cache with a value of its own or not.

    Row b of the batch is to be decoded at length LENGTHS[b].
    """
    random = np.random.default_rng(0)

    def same_rows(*shape: int) -> np.ndarray:
        row = random.standard_normal((TOKENS, *shape), np.float32)
        return np.broadcast_to(row, (len(LENGTHS), *row.shape))

    query = same_rows(num_heads, width + rope_dim)
    cache = {
        "key": same_rows(num_kv_heads, width),
        "value": same_rows(num_kv_heads, value_dim) if value_dim else None,
        "rope_key": same_rows(rope_dim) if rope_dim else None,
    }
    return query, cache


def row_of(cache):
    """Keys and values of a cache as operations on whole rows take them."""
    key, rope_key = cache["key"], cache["rope_key"]
    if rope_key is not None:
        shared = jnp.broadcast_to(rope_key[:, :, None], (*key.shape[:3], rope_key.shape[2]))
        key = jnp.concatenate([key, shared], axis=-1)
    return key, cache["key"] if cache["value"] is None else cache["value"]


def last(x):
    """[B, T, ...] at the last token of each row."""
    return x[np.arange(len(LENGTHS)), LENGTHS - 1]


@pytest.mark.parametrize("shape", [(4, 2, 12, 8, 0), (3, 3, 8, 0, 4)], ids=str)
def test_attention_to_all_keys_is_that_of_the_last_token(shape):
    query, cache = draw(*shape)
    changed = {**cache, "key": cache["key"].copy()}
    changed["key"][:, 33:] = 1e4

    @jax.jit
    def both(query, cache, changed):
        wanted = sliding_window_attention(query, *row_of(cache), window_size=TOKENS)
        actual = decode_attention(last(query), lengths=jnp.array(LENGTHS), **cache)
        behind = decode_attention(last(query), lengths=jnp.array(LENGTHS), **changed)
        empty = decode_attention(last(query), lengths=jnp.zeros_like(LENGTHS), **cache)
        return tuple(map(last, wanted)), actual, behind, empty

    wanted, actual, behind, empty = both(query, cache, changed)
    chex.assert_trees_all_close(actual, wanted, atol=2e-6)
    short = LENGTHS <= 33
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[short], x) for x in (actual, behind)))
    assert not empty[0].any() and (empty[1] == -jnp.inf).all()


def test_a_ring_is_a_cache_of_what_it_holds():
    query, cache = draw(4, 2, 12, 8, 0)
    window, newest = 16, LENGTHS[:, None] - 1
    held = newest - (newest - np.arange(16)) % 16  # position of the token in each slot
    rows = np.arange(len(LENGTHS))[:, None]
    ring = {name: cache[name][rows, np.maximum(held, 0)] for name in ("key", "value")}

    @jax.jit
    def both(query, cache, ring):
        wanted = sliding_window_attention(query, *row_of(cache), window_size=window)
        lengths = jnp.array(np.minimum(LENGTHS, window))
        return tuple(map(last, wanted)), decode_attention(last(query), lengths=lengths, **ring)

    wanted, actual = both(query, cache, ring)
    chex.assert_trees_all_close(actual, wanted, atol=2e-6)


@pytest.mark.parametrize(
    ("shape", "sizes"), [((4, 2, 12, 0, 6), ASA), ((4, 2, 12, 8, 0), NSA)], ids=["asa", "nsa"]
)
def test_lists_and_attention_to_their_blocks_are_those_of_the_last_token(shape, sizes):
    query, cache = draw(*shape)
    size, stride = sizes["compression_block_size"], sizes["compression_stride"]
    every = sizes["queries_per_selection"]
    selection = {"block_size": sizes["block_size"]}
    blocks = number_of_blocks(TOKENS, size, stride)
    starts = stride * np.arange(blocks)[:, None] + np.arange(size)
    pooled = {name: x if x is None else x[:, starts].mean(2) for name, x in cache.items()}
    lengths = jnp.array(LENGTHS)
    kept = np.full((len(LENGTHS), shape[1], 4), -7)

    @jax.jit
    def on_rows(query, cache, pooled):
        key, value = row_of(pooled)
        compressed = compressed_attention(query, key, value, block_size=size, stride=stride)
        lists = select_blocks(query, key, compressed[1], num_selected_blocks=4, **sizes)
        selected = selected_attention(
            query, *row_of(cache), lists, queries_per_selection=every, **selection
        )
        lists = lists[np.arange(len(LENGTHS)), (LENGTHS - 1) // every]
        return tuple(map(last, compressed)), lists, tuple(map(last, selected))

    @jax.jit
    def on_cache(query, cache, pooled, lists):
        complete = jnp.array(np.maximum(0, (LENGTHS - size) // stride + 1))
        compressed = decode_attention(query, lengths=complete, **pooled)
        rope_key = pooled["rope_key"]
        chosen = decode_select_blocks(
            query, pooled["key"], compressed[1], jnp.array(kept), lengths, rope_key=rope_key,
            **sizes,
        )  # fmt: skip
        given = {"block_indices": lists, "lengths": lengths, **selection}
        return compressed, chosen, decode_selected_attention(query, **given, **cache)

    compressed, lists, selected = on_rows(query, cache, pooled)
    actual = on_cache(last(query), cache, pooled, lists)
    starts_list = (LENGTHS - 1) % every == 0
    assert starts_list.any() and (every == 1 or not starts_list.all())
    chex.assert_trees_all_close((actual[0], actual[2]), (compressed, selected), atol=2e-6)
    chex.assert_trees_all_equal(actual[1], np.where(starts_list[:, None, None], lists, kept))


def test_a_list_of_all_blocks_is_attention_to_all_keys():
    query, cache = jax.tree.map(jnp.asarray, draw(4, 2, 12, 0, 6))
    lengths = jnp.array(LENGTHS)

    @jax.jit
    def listed(lists):
        return decode_selected_attention(
            last(query), block_indices=jnp.broadcast_to(lists, (len(LENGTHS), 2, 13)),
            lengths=lengths, block_size=16, **cache,
        )  # fmt: skip

    wanted = jax.jit(lambda: decode_attention(last(query), lengths=lengths, **cache))()
    for lists in ([*range(10), -1, -1, -1], [0, 0, *range(9), 9, 9]):
        chex.assert_trees_all_close(listed(jnp.array(lists)), wanted, atol=2e-6)
    output, lse = listed(jnp.full(13, -1))
    assert not output.any() and (lse == -jnp.inf).all()


CACHE = {
    "query": jnp.zeros((2, 4, 6)),
    "key": jnp.zeros((2, 32, 2, 6)),
    "lengths": jnp.zeros(2, jnp.int32),
}
LISTED = {**CACHE, "block_indices": jnp.zeros((2, 2, 3), jnp.int32)}
VALID = {
    decode_attention: {**CACHE, "value": None},
    decode_selected_attention: {**LISTED, "value": None, "block_size": 16},
    decode_select_blocks: {**LISTED, **ASA, "lse": jnp.zeros((2, 4))},
}
BAD = [
    (VALID, {"query": jnp.zeros((2, 1, 4, 6))}, r"query: expected \[B, N, H\]"),
    (VALID, {"key": jnp.zeros((2, 32, 6))}, r"key: expected \[B, S, K, R\]"),
    (VALID, {"key": jnp.zeros((2, 32, 2, 5))}, "key: expected shape"),
    (VALID, {"key": jnp.zeros((3, 32, 2, 6))}, "key: expected shape"),
    (VALID, {"key": jnp.zeros((2, 32, 3, 6))}, "key: its 3 heads"),
    (VALID, {"rope_key": jnp.zeros((2, 32, 3))}, "rope_key: expected shape"),
    (VALID, {"lengths": jnp.zeros(3, jnp.int32)}, "lengths: expected shape"),
    (VALID, {"lengths": jnp.zeros(2)}, "lengths: expected integers"),
    (VALID, {"implementation": "triton"}, "implementation: expected"),
    (list(VALID)[:2], {"value": jnp.zeros((2, 32, 6))}, "value: expected"),
    (list(VALID)[:2], {"value": jnp.zeros((2, 31, 2, 6))}, "value: expected shape"),
    (list(VALID)[1:], {"block_indices": jnp.zeros((2, 3), jnp.int32)}, "block_indices: expected"),
    (list(VALID)[1:], {"block_indices": jnp.zeros((2, 1, 3), jnp.int32)}, "block_indices: exp"),
    (list(VALID)[1:], {"block_size": 0}, "block_size: expected an int"),
    ([decode_select_blocks], {"lse": jnp.zeros((2, 1, 4))}, "lse: expected shape"),
    ([decode_select_blocks], {"queries_per_selection": 5}, "queries_per_selection: 5 does not"),
]


@pytest.mark.parametrize(
    ("operation", "change", "message"),
    [(operation, change, message) for operations, change, message in BAD
     for operation in operations],
    ids=lambda x: getattr(x, "__name__", None),
)  # fmt: skip
def test_bad_arguments_are_named(operation, change, message):
    with pytest.raises(ValueError, match=message):
        operation(**{**VALID[operation], **change})


@pytest.mark.parametrize("operation", VALID, ids=lambda x: x.__name__)
def test_the_kernel_asked_for_by_name_says_what_it_does_not_take(operation, hopper):
    with pytest.raises(NotImplementedError, match=f"{operation.__name__}: key: float32"):
        operation(**VALID[operation], implementation="mosaic_gpu")
