"""Moves between a pool on the device and pinned blocks of the host, in place, within a program.

What is computed between `exchange` and `join` runs beside the moves. Exchanges of a device follow
one another, so that what one brings to the host the next can bring back.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.gather_library import EXCHANGE, JOIN
from asa_jax.async_tls.pinned_blocks import PinnedBlocks

# Few thread blocks fill the bus and leave the others to what is computed meanwhile.
NUM_CTAS = 16
# Numbers of moves: nothing for a slot, and the first of those for what goes to the host.
NOTHING, TO_HOST = -1, -2
# Numbers of a request in front of its moves: `PinnedBlocks.source`.
REQUEST_HEADER = 3


class Pool(NamedTuple):
    """Slots, and where the side stream finds what it is to move; handed on, never copied.

    Attributes:
        blocks: [rows, slots of a row, ...].
        mailbox: int32 [3 + rows * slots of a row], the last request.
    """

    blocks: jax.Array
    mailbox: jax.Array


def init_pool(blocks: jax.Array) -> Pool:
    """A pool of these blocks, of which none is moved."""
    rows, num_slots = blocks.shape[:2]
    return Pool(blocks, jnp.zeros(REQUEST_HEADER + rows * num_slots, jnp.int32))


def exchange(
    pool: Pool,
    source: jax.Array,
    moves: jax.Array,
    *,
    under_way: bool = False,
    num_ctas: int = NUM_CTAS,
) -> Pool:
    """Starts moves on the side stream and does not wait for them.

    Args:
        pool: changed in place where it is donated.
        source: int32 [3], of `PinnedBlocks.source`.
        moves: int32 [rows, slots of a row]: block n of the host, numbered row after row, that the
            slot is to hold; TO_HOST - n where block n is to hold what the slot does; or NOTHING.
        under_way: whether the pool's last exchange was not joined; it is now, before all else.
        num_ctas: thread blocks of the moves.

    Returns:
        The pool. Before `join` no slot that is filled may be read, and none that is moved written.
    """
    request = jnp.concatenate([source, moves.reshape(-1)])
    call = jax.ffi.ffi_call(EXCHANGE, _like(pool), input_output_aliases={0: 0, 1: 1})
    return Pool(*call(*pool, request, under_way=under_way, num_ctas=np.int64(num_ctas)))


def join(pool: Pool) -> Pool:
    """Lets the device wait until the moves of a pool's last `exchange` are done."""
    call = jax.ffi.ffi_call(JOIN, _like(pool), input_output_aliases={0: 0, 1: 1})
    return Pool(*call(*pool))


def exchange_works(device: jax.Device) -> bool:
    """Whether a few blocks come from the host, and one goes there, as they are.

    Raises:
        GatherUnavailableError: the library cannot be built.
        HostMemoryError: the host has not the memory, or not so much to pin.
    """
    pinned = PinnedBlocks((1, 8, 64, 256), np.dtype(np.float32), device)
    try:
        pinned.host[:, :7] = np.random.default_rng(0).normal(size=(1, 7, 64, 256))
        with jax.default_device(device):
            moves = np.array([[6, 5, 4, 3, 2, 1, 0, TO_HOST - 7]], np.int32)
            pool = _there_and_back(init_pool(jnp.ones(pinned.host.shape)), pinned.source(), moves)
        came = np.array_equal(np.asarray(pool.blocks)[:, :7], pinned.host[:, 6::-1])
        return came and bool((pinned.host[:, 7] == 1).all())
    finally:
        pinned.close()


@functools.partial(jax.jit, donate_argnums=0)
def _there_and_back(pool: Pool, source: jax.Array, moves: jax.Array) -> Pool:
    return join(exchange(pool, source, moves))


def _like(pool: Pool) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pool)
