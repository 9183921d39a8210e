"""Pooling of blocks."""

import chex
import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st

from asa_jax.model.block_cache import cut_blocks, pool_blocks

block_sizes = st.integers(1, 4).flatmap(
    lambda stride: st.tuples(st.integers(1, 3).map(lambda n: n * stride), st.just(stride))
)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(length=st.integers(1, 20), sizes=block_sizes)
def test_blocks_are_the_whole_ones(length, sizes):
    block_size, stride = sizes
    x = np.random.default_rng(0).normal(size=(2, length, 3)).astype(np.float32)
    starts = range(0, length - block_size + 1, stride)
    expected = [x[:, start : start + block_size] for start in starts]
    blocks = cut_blocks(x, block_size, stride)
    chex.assert_shape(blocks, (2, len(starts), block_size, 3))
    for i, block in enumerate(expected):
        chex.assert_trees_all_equal(np.asarray(blocks[:, i]), block)


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(length=st.integers(12, 20), sizes=block_sizes)
def test_pooling_commutes_with_the_up_projection(length, sizes):
    """mean(W c) = W mean(c): latents can be pooled and cached in place of keys and values."""
    rng = np.random.default_rng(0)
    latent, weight = rng.normal(size=(2, length, 5)), rng.normal(size=(5, 3, 4))

    def up(latent):
        return np.einsum("BTR,RNH->BTNH", latent, weight)

    with jax.enable_x64(True):
        pooled, of_projected = pool_blocks(latent, *sizes), pool_blocks(up(latent), *sizes)
    chex.assert_trees_all_close(up(pooled), np.asarray(of_projected), atol=1e-12)


def test_means_of_bfloat16_are_summed_in_float32():
    """1 + 1/256 rounds to 1 in bfloat16: a sum in it would lose the small terms."""
    block = np.concatenate([[256.0], np.ones(15)]).astype(jax.numpy.bfloat16)
    pooled = pool_blocks(block[None], 16, 16)
    chex.assert_trees_all_close(float(pooled[0, 0]), (256 + 15) / 16, rtol=2**-8)
