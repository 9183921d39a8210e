"""Back end B3: the protocol of start and place, on a GPU and, with a thread, on a CPU."""

import ctypes
import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asa_jax.async_tls.engine import slots_for
from asa_jax.async_tls.ffi_gather import FfiGatherBackend
from asa_jax.async_tls.host_memory import HostMemoryError
from asa_jax.async_tls.pinned_blocks import PinnedBlocks, Staged, place, start
from asa_jax.async_tls.slot_table import State
from asa_jax.async_tls.transfers import TransferError
from tests.async_tls.gathers import device_or_skip
from tests.async_tls.test_host_thread import (
    BLOCK,
    BLOCKS,
    CFG,
    HEADS,
    SEQUENCES,
    SHAPE,
    SIZES,
    WIDTH,
    asked,
    check_against_the_simulated,
    engine_of,
    slots_of,
)

PLATFORMS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLATFORMS, scope="module")
def device(request):
    return device_or_skip(request.param)


@pytest.fixture
def backend(device):
    backend = make_backend(device)
    yield backend
    hold(backend, False)
    backend.close()


def make_backend(device, **options):
    options = {"patience_seconds": 30, **options}
    shape = *SIZES, slots_for(CFG), BLOCK, WIDTH, np.dtype(np.float32)
    return FfiGatherBackend(*shape, device=device, num_threads=2, **options)


def hold(backend, held):
    backend._pinned._library.AsaHold(backend._pinned._device, int(held))


def loaded(backend, **options):
    engine = engine_of(backend, **options)
    tokens = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    engine.load(tokens, np.array([BLOCKS * BLOCK] * SEQUENCES))
    return engine


def check_asked_are_there(engine):
    pool, slots = (
        np.asarray(engine.pool),
        slots_of(engine, range(BLOCKS)).reshape(SEQUENCES * HEADS, -1),
    )
    for row, block in np.ndindex(SEQUENCES * HEADS, 3):
        slot = slots[row, 2 + block]
        assert slot >= 0
        np.testing.assert_array_equal(pool[row, slot], engine._backend.host[row, 2 + block])


def test_random_steps_leave_what_the_simulated_back_end_leaves(backend):
    check_against_the_simulated(backend)


def test_a_block_that_is_late_is_missed_and_then_there(backend):
    engine = loaded(backend, late="skip")
    hold(backend, True)
    engine.prefetch(asked())
    engine.commit()
    assert (slots_of(engine, range(2, 5)) < 0).all() and engine.counters.late == 3 * SIZES[0]
    hold(backend, False)
    engine.fetch(asked())
    check_asked_are_there(engine)


def test_random_stalls_do_not_show_in_what_is_read(backend):
    rng = np.random.default_rng(1)
    engine = engine_of(backend, late="skip")
    written = rng.normal(size=SHAPE).astype(np.float32)  # [B, K, S, width]
    lengths = np.array([40, 50])
    engine.load(written, lengths)
    for _ in range(35):
        token = rng.normal(size=(SEQUENCES, HEADS, WIDTH)).astype(np.float32)
        written[np.arange(SEQUENCES), :, engine.lengths] = token
        engine.append(token)
        engine.commit()
        check_slots(engine, written)
        hold(backend, bool(rng.integers(2)))
        rows = [rng.permutation(40 // BLOCK)[: CFG.num_blocks] for _ in range(SIZES[0])]
        engine.prefetch(np.stack(rows).reshape(SEQUENCES, HEADS, -1).astype(np.int32))
    assert engine.counters.late > 100 and engine.counters.hits > 10


def check_slots(engine, written):
    """Every block that has a slot is what was written."""
    pool = np.asarray(engine.pool).reshape(SEQUENCES, HEADS, -1, BLOCK, WIDTH)
    slots = slots_of(engine, range(BLOCKS))
    for sequence, head, block in np.argwhere(slots >= 0):
        known = min(BLOCK, engine.lengths[sequence] - block * BLOCK)
        held = pool[sequence, head, slots[sequence, head, block], :known]
        true = written[sequence, head, block * BLOCK :][:known]
        np.testing.assert_array_equal(held, true)


def test_a_gather_that_stands_still_is_reported_and_its_blocks_come_later(device):
    backend = make_backend(device, patience_seconds=0.2)
    engine = loaded(backend)
    hold(backend, True)
    with pytest.raises(TransferError, match=r"did not land in 0\.2 seconds"):
        engine.fetch(asked())
    assert (slots_of(engine, range(2, 5)) < 0).all()
    with pytest.raises(TransferError, match="does not end, its memory stays"):
        backend._pinned.close(0.05)
    hold(backend, False)
    engine.fetch(asked())
    check_asked_are_there(engine)
    backend.close()


def test_a_gather_that_does_not_start_is_reported_in_one_line(backend):
    engine, library = loaded(backend), backend._pinned._library
    library.AsaClose(backend._pinned._device)
    with pytest.raises(TransferError, match="the gather of this device is closed") as raised:
        engine.fetch(asked())
    assert "\n" not in str(raised.value)
    assert (engine._table.state[:, 2:5] == State.HOST).all()
    library.AsaOpen(backend._pinned._device)
    engine.fetch(asked())
    check_asked_are_there(engine)


def test_what_ended_sequences_asked_for_is_kept_until_it_landed(backend):
    engine = loaded(backend)
    hold(backend, True)
    engine.prefetch(asked())
    engine.reset(np.arange(SEQUENCES))
    gc.collect()
    (held,) = [gather for gather in backend._pinned._gathers if not gather.done()]
    hold(backend, False)
    held.result(30)
    engine = loaded(backend)
    engine.fetch(asked())
    check_asked_are_there(engine)
    assert held not in backend._pinned._gathers


def test_between_start_and_place_of_one_program_there_can_be_other_work(device):
    shape = 2, 5, 4, 256
    blocks = PinnedBlocks(shape, np.dtype(np.float32), device)
    blocks.host[:] = np.random.default_rng(0).normal(size=shape)
    block = jax.ShapeDtypeStruct(shape[2:], np.float32)

    @jax.jit(donate_argnums=0)
    def step(pool, source, numbers, x):
        staged = start(jnp.concatenate([source, numbers + 1]), block)
        x, staged = jax.lax.optimization_barrier((x, staged))
        y = x @ x
        # The last block is none of the host's, and the one before goes nowhere.
        slots = jnp.array([4, 0, 2, -1, -1], jnp.int32)
        return place(pool, staged, jnp.arange(5, dtype=jnp.int32), slots), y

    with jax.default_device(device):
        pool, x = jnp.zeros((2, 3, *shape[2:])), jnp.eye(64)
        numbers = np.array([2, 8, 4, 0, 97], np.int32)
        for _ in range(3):
            blocks._library.AsaHold(blocks._device, 1)
            release = threading.Timer(0.05, blocks._library.AsaHold, (blocks._device, 0))
            release.start()
            pool, y = step(pool, blocks.source(), numbers, x)
            flat, host = np.asarray(pool).reshape(6, 4, 256), blocks.host.reshape(10, 4, 256)
            for slot, number in ((4, 3), (0, 9), (2, 5)):
                np.testing.assert_array_equal(flat[slot], host[number])
            assert (flat[[1, 3, 5]] == 0).all() and (np.asarray(y) == np.eye(64)).all()
            release.join()
            blocks.host[:] += 1
    blocks.close(30)


def test_a_copy_of_a_staged_buffer_is_refused(backend):
    numbers = np.arange(2)
    transfer = backend.start_fetch(numbers, numbers)
    backend.wait(transfer)
    staged = transfer.result()
    copied = Staged(jnp.copy(staged.blocks), staged.request)
    slots = numbers.astype(np.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no gather was started into this buffer"):
        jax.jit(place)(backend.pool, copied, slots, slots).block_until_ready()


def test_closing_ends_stream_and_pinning_however_often_and_by_whom(device):
    backend, other = make_backend(device), make_backend(device)
    pinned, library = other._pinned, other._pinned._library
    backend.close()
    backend.close()
    transfer = backend.start_fetch(np.arange(1), np.arange(1))
    with pytest.raises(TransferError, match="the back end is closed"):
        backend.wait(transfer)
    transfer = other.start_fetch(np.arange(1), np.arange(1))
    other.wait(transfer)
    del other, transfer
    gc.collect()
    assert not pinned.is_open
    # Nobody has the device open now: the second count of closings was the last.
    assert library.AsaClose(pinned._device) == b"the gather of this device is closed"
    if device.platform == "gpu":
        memory, size = pinned._memory, ctypes.c_int64(pinned.host.nbytes)
        address = ctypes.c_void_p()
        assert library.AsaUnpin(memory) is not None
        assert library.AsaPin(memory, size, ctypes.byref(address)) is None
        assert library.AsaUnpin(memory) is None


def test_a_cache_that_the_host_has_no_room_for_is_refused(device):
    with pytest.raises(HostMemoryError, match="bytes of host memory and 5 are free"):
        make_backend(device, available_bytes=5)
