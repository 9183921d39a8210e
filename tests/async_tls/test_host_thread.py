"""Back end B1 against B0: the same calls give the same slots and the same blocks."""

import threading

import jax
import numpy as np
import pytest

from asa_jax.async_tls import host_memory, host_thread
from asa_jax.async_tls.engine import Engine, slots_for
from asa_jax.async_tls.host_memory import HostMemoryError
from asa_jax.async_tls.host_thread import HostThreadBackend
from asa_jax.async_tls.settings import AsyncTLSConfig
from asa_jax.async_tls.simulated import SimulatedBackend
from asa_jax.async_tls.slot_table import State
from asa_jax.async_tls.transfers import TransferError

SEQUENCES, HEADS, BLOCKS, BLOCK, WIDTH = 2, 2, 30, 3, 2
SIZES = SEQUENCES * HEADS, BLOCKS
CFG = AsyncTLSConfig(
    block_size=BLOCK, num_blocks=3, token_budget=4, num_channels=2, drift_cosine=-1.0
)
SHAPE = (SEQUENCES, HEADS, BLOCKS * BLOCK, WIDTH)


@pytest.fixture
def backend():
    backend = make_backend()
    yield backend
    backend.close()


def make_backend():
    return HostThreadBackend(
        *SIZES, slots_for(CFG), BLOCK, WIDTH, np.float32,
        device=jax.devices()[0], num_threads=2,
    )  # fmt: skip


def engine_of(backend, **options):
    return Engine(CFG, SEQUENCES, HEADS, BLOCKS, backend, **options)


def slots_of(engine, blocks):
    """Those of the same blocks in every row."""
    return engine.slots_of(np.broadcast_to(np.array(blocks), (SEQUENCES, HEADS, len(blocks))))


def test_random_steps_leave_what_the_simulated_back_end_leaves(backend):
    check_against_the_simulated(backend)


def check_against_the_simulated(backend):
    rng = np.random.default_rng(0)
    oracle = SimulatedBackend(*SIZES, slots_for(CFG), BLOCK, WIDTH, np.float32)
    engines = engine_of(oracle), engine_of(backend)

    def every(name, *arguments):
        for engine in engines:
            getattr(engine, name)(*arguments)

    for _ in range(3):
        every("load", rng.normal(size=SHAPE).astype(np.float32), rng.integers(30, 64, SEQUENCES))
        for _ in range(26):
            every("append", rng.normal(size=(SEQUENCES, HEADS, WIDTH)).astype(np.float32))
            # A block that has reached the host can lose its slot, so slots would depend on time.
            for move in engines[1]._flushes:
                backend.wait(move.transfer)
            every("commit")
            number = -(-engines[0].lengths.min() // BLOCK)
            rows = [rng.permutation(number)[: CFG.num_blocks] for _ in range(SIZES[0])]
            blocks = np.stack(rows).reshape(SEQUENCES, HEADS, -1).astype(np.int32)
            every(rng.choice(["prefetch", "fetch"]), blocks)
        every("commit")
        np.testing.assert_array_equal(*(slots_of(engine, range(BLOCKS)) for engine in engines))
        np.testing.assert_array_equal(engines[0].pool, np.asarray(engines[1].pool))
        np.testing.assert_array_equal(oracle.host, backend.host)
    assert engines[0].counters.misses > 100
    moved = [(e.counters.to_device_bytes, e.counters.to_host_bytes) for e in engines]
    assert moved[0] == moved[1]


class Held(np.ndarray):
    """A host cache whose blocks are given out only when `go` is set, or never."""

    go = threading.Event()
    fails = False

    def __getitem__(self, key):
        if isinstance(key, tuple):
            self.go.wait()
            if self.fails:
                raise OSError("the host's\nmemory is gone")
        return super().__getitem__(key).view(np.ndarray)


@pytest.fixture
def held(backend):
    engine = engine_of(backend, late="skip")
    engine.load(np.ones(SHAPE, np.float32), np.array([BLOCKS * BLOCK] * SEQUENCES))
    backend.host = backend.host.view(Held)
    Held.go, Held.fails = threading.Event(), False
    yield engine
    Held.go.set()


def asked():
    return np.broadcast_to(np.array([2, 3, 4], np.int32), (SEQUENCES, HEADS, 3))


def test_a_block_that_is_late_is_missed_and_then_there(held):
    held.prefetch(asked())
    held.commit()
    assert (slots_of(held, range(2, 5)) < 0).all() and held.counters.late == 3 * SIZES[0]
    Held.go.set()
    held.fetch(asked())
    assert (slots_of(held, range(2, 5)) >= 0).all()


def test_a_transfer_that_fails_is_reported_in_one_line(held):
    Held.fails = True
    Held.go.set()
    with pytest.raises(TransferError, match=r"failed \(the host's memory is gone\)"):
        held.fetch(asked())
    assert (held._table.state[:, 2:5] == State.HOST).all()
    Held.fails = False
    held.fetch(asked())
    assert (slots_of(held, range(2, 5)) >= 0).all()


def test_a_transfer_that_does_not_land_is_reported(held, monkeypatch):
    monkeypatch.setattr(host_thread, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(TransferError, match=r"did not land in 0\.05 seconds"):
        held.fetch(asked())
    assert (slots_of(held, range(2, 5)) < 0).all()


def test_a_cache_that_the_host_has_no_room_for_is_refused(monkeypatch):
    monkeypatch.setattr(host_memory, "system_available_bytes", lambda: 5)
    with pytest.raises(HostMemoryError, match="bytes of host memory and 5 are free"):
        make_backend()
