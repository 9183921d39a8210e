"""A layer whose bookkeeping is the device's against the same layer under the host's engine."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asa_jax.async_tls import device_layer
from asa_jax.async_tls.device_layer import DeviceLayerConfig, init_layer
from asa_jax.async_tls.engine import Engine, slots_for
from asa_jax.async_tls.layer import OffloadedLayer, joined
from asa_jax.async_tls.pinned_blocks import PinnedBlocks
from asa_jax.async_tls.simulated import SimulatedBackend
from tests.async_tls.cases import BATCH, BLOCK, DIM, HEADS, LENGTH, SCALE, Sample
from tests.async_tls.gathers import device_or_skip
from tests.async_tls.test_layer import CFG, GUARDED, PROMPT, queries_of
from tests.models import QUICK_COMPILE

ROWS, BLOCKS = BATCH * HEADS, LENGTH // BLOCK
PLATFORMS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLATFORMS, scope="module")
def device(request):
    device = device_or_skip(request.param)
    with jax.default_device(device):
        yield device


def under_the_engine(sample, cfg, lagged, value_dim):
    width = DIM if value_dim else 2 * DIM
    backend = SimulatedBackend(ROWS, BLOCKS, slots_for(cfg), BLOCK, width, np.float32)
    engine = Engine(cfg, BATCH, HEADS, BLOCKS, backend)
    one = OffloadedLayer(
        cfg, engine, sample.channels, lagged=lagged, scale=SCALE, value_dim=value_dim
    )
    one.load(sample.key, None if value_dim else sample.value, PROMPT)
    outputs = [np.asarray(one.step(*token)) for token in tokens_of(sample, value_dim)]
    one.request()
    return outputs, engine, one.reselected


def tokens_of(sample, value_dim):
    """Query, key and value of each step."""
    at = np.arange(BATCH)
    for step, query in enumerate(queries_of(sample)):
        place = at, PROMPT + step
        yield query, sample.key[place], None if value_dim else sample.value[place]


def by_block(sample, value_dim):
    """All tokens, block by block of the host: [rows, blocks, block, width]."""
    tokens = np.asarray(joined(sample.key, None if value_dim else sample.value))
    return tokens.swapaxes(1, 2).reshape(ROWS, BLOCKS, BLOCK, -1)


@functools.cache
def program(form):
    step = functools.partial(device_layer.step, cfg=form)
    return jax.jit(step, donate_argnums=0, compiler_options=QUICK_COMPILE)


class OnDevice:
    """A layer, its pinned memory and its program."""

    def __init__(self, sample, cfg, lagged, value_dim, device):
        blocks = by_block(sample, value_dim)
        self.pinned = PinnedBlocks(blocks.shape, blocks.dtype, device)
        # What is not of the prompt comes by itself.
        there = np.arange(BLOCKS) <= np.repeat((PROMPT - 1) // BLOCK, HEADS)[:, None]
        self.pinned.host[:] = np.where(there[..., None, None], blocks, np.nan)
        tails = jnp.asarray(np.repeat((PROMPT - 1) // BLOCK, HEADS), jnp.int32)
        pool = jnp.full((ROWS, slots_for(cfg), *blocks.shape[2:]), jnp.nan)
        self.state = init_layer(
            sample.index(PROMPT), sample.channels,
            pool.at[:, 0].set(blocks[np.arange(ROWS), tails]), tails,
            jnp.asarray(self.pinned.source()),
        )  # fmt: skip
        self._step = program(DeviceLayerConfig(cfg, lagged, SCALE, value_dim, None))

    def step(self, *token):
        output, self.state = self._step(self.state, *token)
        return np.asarray(output)

    def hold(self, held):
        self.pinned._library.AsaHold(self.pinned._device, int(held))

    def close(self):
        jax.block_until_ready(self.state)
        self.pinned.drain()
        self.pinned.close()


FORMS = [(CFG, False, None), (CFG, True, None), (GUARDED, True, None), (CFG, True, DIM // 2)]


@pytest.mark.parametrize(
    ("cfg", "lagged", "value_dim"), FORMS, ids=["sync", "lag", "guard", "latents"]
)
def test_steps_give_what_the_engine_gives(cfg, lagged, value_dim, device):
    sample = Sample(7)
    expected, engine, reselected = under_the_engine(sample, cfg, lagged, value_dim)
    one = OnDevice(sample, cfg, lagged, value_dim, device)
    for token, wanted in zip(tokens_of(sample, value_dim), expected, strict=True):
        np.testing.assert_allclose(one.step(*token), wanted, atol=1e-6)
    sums = [int(x.sum()) for x in one.state.counters]
    one.close()
    assert sums[4] == reselected and (reselected > 0) == (cfg is GUARDED)
    sealed = engine.counters.to_host_bytes // engine._backend.block_bytes
    assert sums[3] == sealed > 0 and sums[0] > 0 and sums[1] > 0
    if cfg is CFG:  # the engine asks again for all heads where one has turned
        assert sums[0] + sums[1] == engine.counters.hits + engine.counters.misses
    held = by_block(sample, value_dim)
    for row, length in enumerate(np.repeat(PROMPT + len(expected), HEADS)):
        whole = length // BLOCK
        np.testing.assert_array_equal(one.pinned.host[row, :whole], held[row, :whole])


def test_a_transfer_that_is_late_is_waited_for(device):
    sample = Sample(8)
    expected, _, _ = under_the_engine(sample, CFG, True, None)
    one = OnDevice(sample, CFG, True, None, device)
    one.hold(True)
    release = threading.Timer(0.2, one.hold, (False,))
    release.start()
    for token, wanted in zip(tokens_of(sample, None), expected, strict=True):
        np.testing.assert_allclose(one.step(*token), wanted, atol=1e-6)
    release.join()
    one.close()


def test_a_pool_that_was_copied_is_refused(device):
    sample = Sample(8)
    one = OnDevice(sample, CFG, True, None, device)
    first, second, *_ = tokens_of(sample, None)
    one.step(*first)
    before = one.state
    one.state = jax.tree.map(jnp.copy, one.state)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="exchange of blocks: none was started with this pool"
    ):
        one.step(*second)
    one.state = before
    one.close()
