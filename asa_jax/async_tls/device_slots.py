"""Which blocks the slots of a pool hold, kept by array operations on the device.

The rules are those of `slot_table`: what is asked for gets slots that are free or, failing that,
those that were not asked for longest; no slot that was asked for is given up. What is always kept
is on every list that is asked for. Pools have slots for two lists, so there are always enough.

Tables are small, so numbers are found by comparing all with all, in few and parallel operations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NO_BLOCK = -1


class DeviceSlots(NamedTuple):
    """Slots of all rows.

    Attributes:
        block_of: int32 [rows, slots], -1 where the slot is free.
        stamp: int32 [rows, slots], when it was asked for last.
    """

    block_of: jax.Array
    stamp: jax.Array


def init_slots(blocks: jax.Array, num_slots: int) -> DeviceSlots:
    """Tables whose first slots hold these blocks [rows] and whose others are free."""
    free = jnp.full((blocks.size, num_slots), NO_BLOCK, jnp.int32)
    return DeviceSlots(free.at[:, 0].set(blocks), jnp.zeros_like(free))


def ask(
    slots: DeviceSlots, blocks: jax.Array, stamp: jax.Array
) -> tuple[DeviceSlots, jax.Array, jax.Array]:
    """Gives slots to blocks.

    Args:
        slots: the tables.
        blocks: int32 [rows, L], no block of a row twice, -1 for none.
        stamp: int32 [rows], above those of before.

    Returns:
        The tables; int32 [rows, slots], the blocks that slots are new to hold, -1 for none; and
        bool [rows, L], which blocks had slots before.
    """
    here = _same(slots, blocks)
    asked, found = here.any(1), here.any(2)
    missing = (blocks >= 0) & ~found
    number = jnp.where(missing, jnp.cumsum(missing, axis=1) - 1, NO_BLOCK)
    # The places of slots in the order in which they are given up.
    age = jnp.where(slots.block_of < 0, NO_BLOCK, slots.stamp)
    age = jnp.where(asked, jnp.iinfo(jnp.int32).max, age)
    every = jnp.arange(age.shape[1])
    older = (age[:, None] < age[..., None]) | (
        (age[:, None] == age[..., None]) & (every < every[:, None])
    )
    place = older.sum(2)
    given = place[:, None] == number[..., None]
    incoming = jnp.where(given, blocks[..., None], NO_BLOCK).max(1)
    new = incoming >= 0
    block_of = jnp.where(new, incoming, slots.block_of)
    return (
        DeviceSlots(block_of, jnp.where(asked | new, stamp[:, None], slots.stamp)),
        incoming,
        found,
    )


def slots_of(slots: DeviceSlots, blocks: jax.Array) -> jax.Array:
    """The slots of blocks [rows, L], int32; -1 for those without one, or that are -1."""
    every = jnp.arange(slots.block_of.shape[1], dtype=jnp.int32)
    return jnp.where(_same(slots, blocks), every, NO_BLOCK).max(2)


def _same(slots: DeviceSlots, blocks: jax.Array) -> jax.Array:
    """Which slots hold which blocks, bool [rows, L, slots]."""
    return (blocks[..., None] == slots.block_of[:, None]) & (blocks[..., None] >= 0)
