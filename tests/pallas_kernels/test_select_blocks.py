"""Block importance and the choice of blocks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.blocks import document_starts, number_of_blocks
from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.select_blocks import block_importance, select_blocks
from pallas_kernels.select_blocks.reference import choose_blocks

NUM_BLOCKS = 9


def weights_of_block(block: int, **sizes: int) -> dict[int, float]:
    """Weight of each compressed block in the importance of one block, by one-hot probabilities."""
    num_compressed = number_of_blocks(
        NUM_BLOCKS * sizes["block_size"],
        sizes["compression_block_size"],
        sizes["compression_stride"],
    )
    one_hot = jnp.eye(num_compressed)[:, None]
    importance = np.asarray(block_importance(one_hot, num_blocks=NUM_BLOCKS, **sizes))
    return {c: float(importance[c, block]) for c in np.flatnonzero(importance[:, block])}


def test_nsa_importance_weighs_overlapping_blocks_by_1_2_2_2_1():
    sizes = {"block_size": 64, "compression_block_size": 32, "compression_stride": 16}
    for j in range(1, NUM_BLOCKS - 1):
        expected = {4 * j - 1: 1, 4 * j: 2, 4 * j + 1: 2, 4 * j + 2: 2, 4 * j + 3: 1}
        assert weights_of_block(j, **sizes) == expected
    assert weights_of_block(0, **sizes) == {0: 2, 1: 2, 2: 2, 3: 1}


@pytest.mark.parametrize("size", [1, 16])
def test_importance_of_equal_blocks_is_the_probability(size):
    sizes = {"block_size": size, "compression_block_size": size, "compression_stride": size}
    probabilities = np.random.default_rng(0).random((2, 3, NUM_BLOCKS), np.float32)
    importance = block_importance(probabilities, num_blocks=NUM_BLOCKS, **sizes)
    chex.assert_trees_all_close(importance, probabilities.sum(1), rtol=1e-6)


@settings(deadline=None)
@given(
    importance=st.lists(st.integers(0, 3), min_size=NUM_BLOCKS, max_size=NUM_BLOCKS),
    blocks=st.tuples(st.integers(-1, NUM_BLOCKS - 1), st.integers(0, NUM_BLOCKS - 1)),
    count=st.sampled_from([1, 2, 3, 5, 12]),
)
def test_choice_of_blocks(importance, blocks, count):
    own, first = blocks
    lists = jax.jit(choose_blocks, static_argnums=3)(
        jnp.asarray(importance, jnp.float32), jnp.asarray([own]), jnp.asarray([first]), count
    )
    nearest_first = [own, own - 1, first]
    forced = list(dict.fromkeys(block for block in nearest_first if first <= block <= own))
    others = [block for block in range(first, own + 1) if block not in forced]
    by_importance = sorted(others, key=lambda block: (-importance[block], block))
    expected = sorted((forced + by_importance)[:count])
    assert lists.tolist() == expected + [-1] * (count - len(expected))


def test_equal_importance_goes_to_the_lower_index():
    query, key = jnp.zeros((1, 160, 2, 4)), jnp.zeros((1, 10, 1, 4))
    _, lse = compressed_attention(query, key, None, value_dim=4, block_size=16, stride=16)
    lists = select_blocks(
        query,
        key,
        lse,
        num_selected_blocks=5,
        block_size=16,
        compression_block_size=16,
        compression_stride=16,
        queries_per_selection=4,
    )
    assert lists[0, -1, 0].tolist() == [0, 1, 2, 8, 9]
    assert lists[0, 0, 0].tolist() == [0, -1, -1, -1, -1]


def test_choice_has_no_gradient():
    query, key = jnp.ones((1, 32, 2, 4)), jnp.ones((1, 2, 1, 4))

    def loss(query, key):
        lists = select_blocks(
            query,
            key,
            query.sum(-1),
            num_selected_blocks=2,
            block_size=16,
            compression_block_size=16,
            compression_stride=16,
            queries_per_selection=4,
        )
        return lists.astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(query, key)
    chex.assert_trees_all_equal(gradients, (jnp.zeros_like(query), jnp.zeros_like(key)))


def test_document_starts():
    segment_ids = jnp.asarray([[1, 1, 2, 2, 2, 0, 0, 3], [0, 0, 1, 1, 1, 1, 1, 1]])
    expected = jnp.asarray([[0, 0, 2, 2, 2, 5, 5, 7], [0, 0, 2, 2, 2, 2, 2, 2]], jnp.int32)
    chex.assert_trees_all_equal(document_starts(segment_ids), expected)


@pytest.mark.parametrize(
    ("num_tokens", "block_size", "stride", "expected"),
    [(0, 16, 16, 0), (15, 16, 16, 0), (16, 16, 16, 1), (47, 32, 16, 1), (48, 32, 16, 2)],
)
def test_number_of_blocks(num_tokens, block_size, stride, expected):
    assert number_of_blocks(num_tokens, block_size, stride) == expected
