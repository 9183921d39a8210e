"""Slot tables on the device, against lists and sets."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from asa_jax.async_tls.device_slots import ask, init_slots, slots_of
from tests.async_tls.cases import jit

ROWS, LIST, BLOCKS = 2, 4, 30
SLOTS = 2 * LIST
ask, slots_of = jit(ask), jit(slots_of)
rows = st.lists(st.integers(0, BLOCKS - 1), max_size=LIST, unique=True)


class Model:
    """A row: the blocks that have slots, and when they were asked for."""

    def __init__(self, block):
        self.held, self.asked_at = {0: block}, {block: 0}

    def ask(self, blocks, stamp):
        """Returns the slots that are new to hold a block, and which."""
        present = set(self.held.values())
        new = [block for block in blocks if block not in present]
        free = [slot for slot in range(SLOTS) if slot not in self.held]
        idle = [slot for slot, block in self.held.items() if block not in blocks]
        idle.sort(key=lambda slot: (self.asked_at[self.held[slot]], slot))
        given = dict(zip(free + idle, new, strict=False))
        self.held |= given
        self.asked_at |= dict.fromkeys(blocks, stamp)
        return given


def by_slot(blocks):
    return {slot: int(block) for slot, block in enumerate(blocks) if block >= 0}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(rows, min_size=ROWS, max_size=ROWS), min_size=1, max_size=12))
def test_random_lists_leave_the_tables_that_simple_rules_leave(lists):
    slots, models = init_slots(jnp.array([3, 5]), SLOTS), [Model(3), Model(5)]
    before = np.full((ROWS, LIST), -1, np.int32)
    for stamp, blocks in enumerate(lists, 1):
        asked = np.full((ROWS, LIST), -1, np.int32)
        for row, listed in enumerate(blocks):
            asked[row, : len(listed)] = listed
        had = [set(model.held.values()) for model in models]
        slots, incoming, found = ask(slots, asked, jnp.full(ROWS, stamp, jnp.int32))
        for row, (listed, model) in enumerate(zip(blocks, models, strict=True)):
            given = model.ask(listed, stamp)
            assert {
                int(s): int(incoming[row, s]) for s in np.flatnonzero(incoming[row] >= 0)
            } == given
            held = slots.block_of[row]
            assert {int(s): int(held[s]) for s in np.flatnonzero(held >= 0)} == model.held
            assert [bool(x) for x in found[row]] == [b in had[row] and b >= 0 for b in asked[row]]
        # What was asked for now and in the step before can be read, and nothing stands twice.
        for listed in (asked, before):
            place = np.asarray(slots_of(slots, listed))
            assert ((place >= 0) == (listed >= 0)).all()
            there = np.take_along_axis(np.asarray(slots.block_of), place.clip(0), 1)
            assert (there[listed >= 0] == listed[listed >= 0]).all()
        before = asked
