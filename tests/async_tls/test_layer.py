"""A layer with keys and values on the host against the same selections from memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asa_jax.async_tls.engine import Engine, slots_for
from asa_jax.async_tls.host_thread import HostThreadBackend
from asa_jax.async_tls.layer import OffloadedLayer
from asa_jax.async_tls.selection import lagged_step, synchronous_step
from asa_jax.async_tls.simulated import SimulatedBackend
from asa_jax.async_tls.token_attention import attend_tokens
from tests.async_tls.cases import BATCH, BLOCK, DIM, HEADS, LENGTH, SCALE, SMALL, Sample, jit

# A pool of 8 of the 12 blocks, so that blocks come and go.
CFG = dataclasses.replace(SMALL, num_blocks=1, token_budget=3)
GUARDED = dataclasses.replace(CFG, drift_cosine=0.3)
PROMPT = np.array([21, LENGTH - 9])

synchronous = jit(functools.partial(synchronous_step, scale=SCALE), static_argnames="cfg")
lagged_form = jit(functools.partial(lagged_step, scale=SCALE), static_argnames="cfg")
attend = jit(functools.partial(attend_tokens, scale=SCALE))


def queries_of(sample):
    """Those of each step; some alike, some not."""
    turns = [0, 0, 1, 1, 2, 2, 2, 3, 3]
    noise = np.random.default_rng(0).normal(size=(len(turns), *sample.queries.shape[1:]))
    return [
        sample.queries[i] + jnp.asarray(0.1 * x, jnp.float32)
        for i, x in zip(turns, noise, strict=True)
    ]


def from_memory(sample, lagged, cfg):
    lag, outputs = None, []
    for step, query in enumerate(queries_of(sample), 1):
        index = sample.index(PROMPT + step)
        if lagged and lag:
            tokens, lag, _ = lagged_form(query, index, sample.channels, lag=lag, cfg=cfg)
        else:
            tokens, lag = synchronous(query, index, sample.channels, cfg=cfg)
        outputs.append(np.asarray(attend(query, sample.key, sample.value, tokens)))
    return outputs


def from_host(sample, lagged, cfg, late="wait", backend=SimulatedBackend, **options):
    blocks = LENGTH // BLOCK
    sizes = BATCH * HEADS, blocks, slots_for(cfg), BLOCK, 2 * DIM
    backend = backend(*sizes, np.float32, **options)
    engine = Engine(cfg, BATCH, HEADS, blocks, backend, late=late)
    layer = OffloadedLayer(cfg, engine, sample.channels, lagged=lagged, scale=SCALE)
    queries, at = queries_of(sample), np.arange(BATCH)
    layer.load(sample.key, sample.value, PROMPT)
    outputs = []
    for step, query in enumerate(queries):
        place = at, PROMPT + step
        outputs.append(np.asarray(layer.step(query, sample.key[place], sample.value[place])))
    return outputs, engine, layer


@pytest.mark.parametrize(
    ("lagged", "cfg"), [(False, CFG), (True, CFG), (True, GUARDED)], ids=["sync", "lag", "guard"]
)
def test_blocks_from_the_host_give_what_memory_gives(lagged, cfg):
    """However long transfers take: they are waited for."""
    sample = Sample(7)
    expected = from_memory(sample, lagged, cfg)
    rng = np.random.default_rng(0)
    for ticks in (lambda: 0, lambda: int(rng.integers(0, 4))):
        outputs, engine, layer = from_host(sample, lagged, cfg, ticks_of=ticks)
        for output, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(output, wanted, atol=1e-5)
        assert engine.counters.misses > 0 and engine.counters.hits > 0
        assert (layer.reselected > 0) == (cfg is GUARDED)


def test_host_threads_give_the_same_bits():
    sample = Sample(9)
    expected, engine, _ = from_host(sample, True, GUARDED)
    threads = {"backend": HostThreadBackend, "device": jax.devices()[0], "num_threads": 2}
    outputs, threaded, _ = from_host(sample, True, GUARDED, **threads)
    threaded._backend.close()
    np.testing.assert_array_equal(outputs, expected)
    # Where blocks stay may depend on when others reached the host; what is asked for does not.
    found = [e.counters.hits + e.counters.misses for e in (engine, threaded)]
    assert found[0] == found[1] > 0


def test_without_waiting_late_blocks_are_left_out_and_counted():
    sample = Sample(7)
    outputs, engine, _ = from_host(
        sample, True, CFG, late="skip", ticks_of=_late_after_the_prompt()
    )
    assert np.isfinite(outputs).all()
    # The first step selects by its own query, and waits.
    assert engine.counters.late > 0 and engine.counters.stalled_transfers <= 1
    expected = from_memory(sample, True, CFG)
    assert not np.allclose(outputs, expected, atol=1e-3)


def _late_after_the_prompt():
    numbers = iter(range(1000))
    return lambda: 0 if next(numbers) < 2 else 50


def test_latents_are_keys_and_values_at_once():
    """One head of absorbed latents whose first features are the value."""
    sample, value_dim = Sample(8), 5
    key, channels, blocks = sample.key[:, :, :1], sample.channels[:1], LENGTH // BLOCK
    backend = SimulatedBackend(BATCH, blocks, slots_for(CFG), BLOCK, DIM, np.float32)
    whole = dataclasses.replace(CFG, num_blocks=1, token_budget=BLOCK)
    engine = Engine(whole, BATCH, 1, blocks, backend)
    layer = OffloadedLayer(whole, engine, channels, lagged=True, scale=SCALE, value_dim=value_dim)
    # 4 blocks: the one that is not always kept is selected as a whole.
    lengths = np.array([3 * BLOCK + 1, 4 * BLOCK - 1])
    layer.load(key, None, lengths)
    place = np.arange(BATCH), lengths
    output = layer.step(sample.queries[1], key[place], None)
    positions = np.where(np.arange(LENGTH) <= lengths[:, None], np.arange(LENGTH), -1)[:, None]
    expected = attend(sample.queries[1], key, key[..., :value_dim], jnp.asarray(positions))
    np.testing.assert_allclose(np.asarray(output), np.asarray(expected), atol=1e-5)
