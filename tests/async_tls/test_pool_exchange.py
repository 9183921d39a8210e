"""Back end B3: moves between a pool and the host, on a GPU and, with a thread, on a CPU."""

import ctypes
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asa_jax.async_tls import host_memory
from asa_jax.async_tls.host_memory import HostMemoryError
from asa_jax.async_tls.pinned_blocks import PinnedBlocks
from asa_jax.async_tls.pool_exchange import NOTHING, TO_HOST, Pool, exchange, init_pool, join
from tests.async_tls.gathers import device_or_skip

PLATFORMS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
ROWS, BLOCKS, SLOTS, BLOCK = 2, 40, 30, (4, 3)  # blocks of 48 bytes


@pytest.fixture(params=PLATFORMS, scope="module")
def device(request):
    device = device_or_skip(request.param)
    with jax.default_device(device):
        yield device


@pytest.fixture(params=[np.float32, np.int8], ids=["in_16_bytes", "in_bytes"])
def pinned(device, request):
    pinned = PinnedBlocks((ROWS, BLOCKS, *BLOCK), np.dtype(request.param), device)
    numbers = np.random.default_rng(0).integers(-100, 100, pinned.host.shape)
    pinned.host[:] = numbers
    yield pinned
    hold(pinned, False)
    pinned.close()


def hold(pinned, held):
    pinned._library.AsaHold(pinned._device, int(held))


def pool_of(pinned):
    return init_pool(jnp.full((ROWS, SLOTS, *BLOCK), 7, pinned.host.dtype))


@jax.jit(donate_argnums=0, static_argnames=("under_way", "joined"))
def moved(pool, source, moves, x, under_way=False, joined=True):
    pool = exchange(pool, source, moves, under_way=under_way)
    x, pool = jax.lax.optimization_barrier((x, pool))
    y = x @ x
    return (join(pool) if joined else pool), y


def random_moves(rng):
    """Each block of the host in at most one move, some beyond it; a third of the slots in none."""
    numbers = rng.permutation(ROWS * BLOCKS)[: ROWS * SLOTS]
    kinds = rng.integers(3, size=numbers.size)
    moves = np.choose(kinds, [NOTHING, numbers, TO_HOST - numbers])
    moves[rng.integers(moves.size, size=3)] = ROWS * BLOCKS + 5
    return moves.reshape(ROWS, SLOTS).astype(np.int32)


def expect(pool, host, moves):
    """What `moves` make of arrays of the pool and the host, in place."""
    blocks = host.reshape(-1, *BLOCK)
    before = blocks.copy()
    for place, move in np.ndenumerate(moves):
        if move <= TO_HOST:
            blocks[TO_HOST - move] = pool[place]
        elif NOTHING < move < len(blocks):
            pool[place] = before[move]


def test_random_moves_beside_other_work_are_those_of_arrays(pinned):
    rng, x = np.random.default_rng(1), jnp.eye(64)
    pool = pool_of(pinned)
    wanted_pool, wanted_host = np.array(pool.blocks), pinned.host.copy()
    for number in range(12):
        moves = random_moves(rng)
        expect(wanted_pool, wanted_host, moves)
        hold(pinned, True)
        release = threading.Timer(0.02, hold, (pinned, False))
        release.start()
        # Every other exchange is joined by the one behind it.
        pool, y = moved(
            pool, pinned.source(), moves, x, under_way=number % 2 == 1, joined=number % 2 == 1
        )
        release.join()
        assert (np.asarray(y) == np.eye(64)).all()
        if number % 2 == 1:
            np.testing.assert_array_equal(np.asarray(pool.blocks), wanted_pool)
            pinned.drain()
            np.testing.assert_array_equal(pinned.host, wanted_host)


def test_all_blocks_go_to_the_host_at_once(pinned):
    blocks = jnp.asarray(pinned.host[:, ::-1])
    wanted = pinned.host[:, ::-1].copy()
    pinned.store(blocks)
    np.testing.assert_array_equal(pinned.host, wanted)
    with pytest.raises(ValueError, match="are not as the host's"):
        pinned.store(blocks[:1])


def test_a_copied_pool_and_a_closed_stream_are_refused_in_one_line(pinned):
    moves, x = np.full((ROWS, SLOTS), NOTHING, np.int32), jnp.eye(4)
    pool, _ = moved(pool_of(pinned), pinned.source(), moves, x, joined=False)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="exchange of blocks: none was started with this pool"
    ):
        jax.block_until_ready(jax.jit(join)(Pool(*jax.tree.map(jnp.copy, pool))))
    pinned.drain()
    assert pinned._library.AsaClose(pinned._device) is None
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="exchange of blocks: the side stream of this device is"
    ):
        jax.block_until_ready(moved(pool, pinned.source(), moves, x))
    assert pinned._library.AsaOpen(pinned._device) is None


def test_closing_waits_and_ends_stream_and_pinning_however_often(device):
    shape = (ROWS, BLOCKS, *BLOCK)
    one, other = (PinnedBlocks(shape, np.dtype(np.float32), device) for _ in range(2))
    moves = np.full((ROWS, SLOTS), NOTHING, np.int32)
    moves[0, 0] = TO_HOST - 3
    hold(one, True)
    release = threading.Timer(0.1, hold, (other, False))
    release.start()
    pool, _ = moved(pool_of(one), one.source(), moves, jnp.eye(4), joined=False)
    one.close()
    assert (one.host.reshape(-1, *BLOCK)[3] == 7).all()
    one.close()
    release.join()
    jax.block_until_ready(pool)
    other.close()
    # Nobody has the device open now: the second closing was the last.
    library, number = other._library, other._device
    assert library.AsaClose(number) == b"the side stream of this device is closed"
    if device.platform == "gpu":
        size, address = ctypes.c_int64(other.host.nbytes), ctypes.c_void_p()
        assert library.AsaUnpin(other._memory) is not None
        assert library.AsaPin(other._memory, size, ctypes.byref(address)) is None
        assert library.AsaUnpin(other._memory) is None


def test_a_cache_that_the_host_has_no_room_for_is_refused(device, monkeypatch):
    monkeypatch.setattr(host_memory, "system_available_bytes", lambda: 5)
    with pytest.raises(HostMemoryError, match="bytes of host memory and 5 are free"):
        PinnedBlocks((1, 2, 4), np.dtype(np.float32), device)
