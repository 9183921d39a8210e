"""A small cache, its index, and what selection from it has to be, in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.index import append, init_index
from asa_jax.async_tls.settings import AsyncTLSConfig
from tests.models import QUICK_COMPILE

BATCH, LENGTH, HEADS, GROUP, DIM, CHANNELS, BLOCK = 2, 48, 2, 2, 8, 4, 4
SCALE = 0.7
SMALL = AsyncTLSConfig(
    block_size=BLOCK, num_blocks=3, token_budget=5, num_channels=CHANNELS, drift_cosine=-1.0
)
jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
jitted_append = jit(append)


class Sample:
    """Random keys, values, queries and channels of a seed."""

    def __init__(self, seed, dtype=jnp.float32):
        rng = np.random.default_rng(seed)
        tokens = (BATCH, LENGTH, HEADS, DIM)
        self.dtype = dtype
        self.key, self.value = (jnp.asarray(2 * rng.normal(size=tokens), dtype) for _ in range(2))
        self.queries = jnp.asarray(rng.normal(size=(8, BATCH, HEADS * GROUP, DIM)), dtype)
        channels = [np.sort(rng.permutation(DIM)[:CHANNELS]) for _ in range(HEADS)]
        self.channels = jnp.asarray(np.stack(channels), jnp.int32)

    def index(self, lengths):
        """The index of the first tokens of each row."""
        empty = init_index(
            BATCH, LENGTH, HEADS, DIM, num_channels=CHANNELS, block_size=BLOCK, dtype=self.dtype
        )
        return jitted_append(empty, self.key, self.channels, jnp.asarray(lengths, jnp.int32))


@jit
def dense(query, key, value, lengths):
    """Attention to the first tokens of each row, [B, N, h]."""
    grouped = query.reshape(*query.shape[:1], key.shape[2], -1, query.shape[2])
    scores = SCALE * jnp.einsum("BKGH,BSKH->BKGS", grouped, key)
    there = (jnp.arange(key.shape[1]) < lengths[:, None])[:, None, None]
    weights = jax.nn.softmax(scores, where=there)
    return jnp.einsum("BKGS,BSKH->BKGH", weights, value).reshape(*query.shape[:2], -1)


def kept_blocks(length):
    """Blocks that are attended to in any case."""
    tail = (length - 1) // BLOCK
    return {block for block in (0, tail - 1, tail) if 0 <= block <= tail}
