"""A layer with keys and values on the host against the same selections from memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asa_jax.async_tls import layer
from asa_jax.async_tls.engine import Engine, slots_for
from asa_jax.async_tls.host_thread import HostThreadBackend
from asa_jax.async_tls.index import init_index
from asa_jax.async_tls.layer import OffloadedLayer
from asa_jax.async_tls.selection import lagged_step, synchronous_step
from asa_jax.async_tls.simulated import SimulatedBackend
from asa_jax.async_tls.token_attention import attend_tokens
from pallas_kernels import dispatch
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
    one = OffloadedLayer(cfg, engine, sample.channels, lagged=lagged, scale=SCALE)
    queries, at = queries_of(sample), np.arange(BATCH)
    one.load(sample.key, sample.value, PROMPT)
    outputs = []
    for step, query in enumerate(queries):
        place = at, PROMPT + step
        outputs.append(np.asarray(one.step(query, sample.key[place], sample.value[place])))
    return outputs, engine, one


@pytest.mark.parametrize(
    ("lagged", "cfg"), [(False, CFG), (True, CFG), (True, GUARDED)], ids=["sync", "lag", "guard"]
)
def test_blocks_from_the_host_give_what_memory_gives(lagged, cfg):
    """However long transfers take: they are waited for."""
    sample = Sample(7)
    expected = from_memory(sample, lagged, cfg)
    rng = np.random.default_rng(0)
    for ticks in (lambda: 0, lambda: int(rng.integers(0, 4))):
        outputs, engine, one = from_host(sample, lagged, cfg, ticks_of=ticks)
        for output, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(output, wanted, atol=1e-5)
        assert engine.counters.misses > 0 and engine.counters.hits > 0
        assert (one.reselected > 0) == (cfg is GUARDED)


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


@pytest.mark.parametrize("value_dim", [None, pytest.param(512, marks=pytest.mark.slow)])
def test_a_hopper_gpu_selects_and_attends_by_kernels(value_dim, monkeypatch):
    """Two for blocks, three for tokens, one that attends; nothing is put together before them."""
    monkeypatch.setattr(dispatch, "is_hopper", lambda: True)
    heads, dim, width, channels = (2, 128, 256, 32) if value_dim is None else (1, 576, 576, 128)
    cfg = dataclasses.replace(
        CFG, block_size=64, num_blocks=32, token_budget=512, num_channels=channels
    )

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    index = jax.eval_shape(
        lambda: init_index(
            2, 8192, heads, dim, num_channels=channels, block_size=64, dtype=jnp.bfloat16
        )
    )
    query, key = shape(2, 4, dim), shape(2, heads, dim)
    value = key if value_dim is None else None
    of_labels, lists = (
        shape(heads, channels, dtype=jnp.int32),
        shape(2, heads, 35, dtype=jnp.int32),
    )
    sizes = {"cfg": cfg, "implementation": None}
    advance = layer._advance.trace(query, key, value, index, of_labels, ahead=1, **sizes)
    pool = shape(2 * heads, slots_for(cfg), 64, width)
    attend = layer.attend_places.trace(
        query, index, of_labels, lists, lists, pool, scale=SCALE, value_dim=value_dim, **sizes
    )
    for traced, kernels in ((advance, 2), (attend, 4)):
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu") == kernels


def test_latents_are_keys_and_values_at_once():
    """One head of absorbed latents whose first features are the value."""
    sample, value_dim = Sample(8), 5
    key, channels, blocks = sample.key[:, :, :1], sample.channels[:1], LENGTH // BLOCK
    backend = SimulatedBackend(BATCH, blocks, slots_for(CFG), BLOCK, DIM, np.float32)
    whole = dataclasses.replace(CFG, num_blocks=1, token_budget=BLOCK)
    engine = Engine(whole, BATCH, 1, blocks, backend)
    one = OffloadedLayer(whole, engine, channels, lagged=True, scale=SCALE, value_dim=value_dim)
    # 4 blocks: the one that is not always kept is selected as a whole.
    lengths = np.array([3 * BLOCK + 1, 4 * BLOCK - 1])
    one.load(key, None, lengths)
    place = np.arange(BATCH), lengths
    output = one.step(sample.queries[1], key[place], None)
    positions = np.where(np.arange(LENGTH) <= lengths[:, None], np.arange(LENGTH), -1)[:, None]
    expected = attend(sample.queries[1], key, key[..., :value_dim], jnp.asarray(positions))
    np.testing.assert_allclose(np.asarray(output), np.asarray(expected), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not dispatch.is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("value_dim", [None, 512])
def test_kernels_on_a_gpu_give_what_xla_gives(value_dim):
    """But for what sums in another order choose otherwise."""
    outputs = [_bfloat16_steps(value_dim, implementation) for implementation in (None, "xla")]
    actual, expected = (np.asarray(jnp.stack(x), np.float32) for x in outputs)
    assert np.linalg.norm(actual - expected) < 0.1 * np.linalg.norm(expected)


def _bfloat16_steps(value_dim, implementation):
    """Outputs of four steps behind prompts of two rows, lagged."""
    heads, dim, channels = (2, 128, 32) if value_dim is None else (1, 576, 128)
    cfg = dataclasses.replace(
        CFG, block_size=64, num_blocks=32, token_budget=512, num_channels=channels
    )
    width = dim if value_dim else 2 * dim
    backend = HostThreadBackend(
        2 * heads, 128, slots_for(cfg), 64, width, jnp.bfloat16,
        device=jax.devices()[0], num_threads=2,
    )  # fmt: skip
    engine = Engine(cfg, 2, heads, 128, backend)
    spread = np.arange(channels, dtype=np.int32) * dim // channels
    one = OffloadedLayer(
        cfg, engine, np.stack([spread] * heads), lagged=True, scale=dim**-0.5,
        value_dim=value_dim, implementation=implementation,
    )  # fmt: skip

    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    key = normal(0, 2, 8192, heads, dim)
    value = None if value_dim else normal(1, *key.shape)
    one.load(key, value, np.array([8000, 5000]))
    outputs = []
    for step in range(4):
        new = normal(2 + step, 2, heads, dim)
        query = normal(9, 2, 4, dim) + 0.3 * normal(10 + step, 2, 4, dim)
        outputs.append(one.step(query, new, None if value_dim else -new))
    backend.close()
    return outputs
