"""Where blocks are: the states of blocks, the slots of the pool, and which slot goes next.

    EMPTY -> TAIL (filling) -> SEALING (on its way to the host) -> RESIDENT <-> HOST
                                                    HOST -> LOADING (on its way back) -> RESIDENT

A block has a slot in TAIL, SEALING and RESIDENT, and may be read there. Sealed blocks never change,
so a RESIDENT one is given up without a write. The slots of other states are never given up.
"""

from collections.abc import Callable

import numpy as np


class State:
    """Of a block of a row; no enum, with which numpy compares ten times slower."""

    EMPTY = np.int8(0)
    TAIL = np.int8(1)
    SEALING = np.int8(2)
    RESIDENT = np.int8(3)
    HOST = np.int8(4)
    LOADING = np.int8(5)


class SlotTable:
    """Blocks and slots of all rows; a row is one key head of one sequence.

    Attributes:
        state: int8 [rows, blocks], a `State`.
        slot_of: int32 [rows, blocks], -1 where the block has none.
        block_of: int32 [rows, slots], -1 where the slot is free.
        stamp: int64 [rows, slots], when the slot's block was last used.
    """

    def __init__(self, num_rows: int, num_blocks: int, num_slots: int) -> None:
        """Starts with free slots and empty blocks."""
        self.state = np.full((num_rows, num_blocks), State.EMPTY, np.int8)
        self.slot_of = np.full((num_rows, num_blocks), -1, np.int32)
        self.block_of = np.full((num_rows, num_slots), -1, np.int32)
        self.stamp = np.zeros((num_rows, num_slots), np.int64)
        self._clock = 0

    def clear(self, rows: np.ndarray) -> None:
        """Frees the slots of rows and empties their blocks."""
        self.state[rows] = State.EMPTY
        self.slot_of[rows] = self.block_of[rows] = -1

    def touch(self, rows: np.ndarray, blocks: np.ndarray) -> None:
        """Marks blocks as used now, those that have a slot."""
        self._clock += 1
        # Flat numbers here and below: an index for each axis takes several times longer.
        slots = self.slot_of.take(rows * self.state.shape[1] + blocks)
        places = (rows * self.stamp.shape[1] + slots)[slots >= 0]
        self.stamp.reshape(-1)[places] = self._clock

    def take(
        self,
        rows: np.ndarray,
        blocks: np.ndarray,
        state: np.int8,
        wanted: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> np.ndarray | None:
        """Gives each block a slot: a free one, or that of the block that was not used for longest.

        Args:
            rows: ascending; a row may come more than once.
            blocks: without a slot.
            state: that they get.
            wanted: says of blocks [rows, slots] of rows [rows, 1] which are not to lose their
                slots; what it says of -1 does not matter.

        Returns:
            The slots, or None and no change where a row has too few to give.
        """
        if not rows.size:
            return rows
        order, number_free = self._victims(wanted)
        place = np.arange(len(rows)) - np.searchsorted(rows, rows)
        if (place >= number_free[rows]).any():
            return None
        slots = order[rows, place] % self.block_of.shape[1]
        before = self.block_of[rows, slots]
        held = before >= 0
        self.state[rows[held], before[held]] = State.HOST
        self.slot_of[rows[held], before[held]] = -1
        self.block_of[rows, slots], self.slot_of[rows, blocks] = blocks, slots
        self.state[rows, blocks] = state
        self.touch(rows, blocks)
        return slots

    def _victims(
        self, wanted: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Slots [rows, slots] in the order in which they are given up, and how many can be.

        They stand modulo the number of slots, because a sort of numbers that hold the slot is
        several times faster than one that gives places.
        """
        (num_rows, num_slots), num_blocks = self.block_of.shape, self.state.shape[1]
        every = np.arange(num_rows)[:, None]
        free = self.block_of < 0
        state = self.state.take(every * num_blocks + self.block_of, mode="clip")
        idle = (state == State.RESIDENT) & ~wanted(every, self.block_of) & ~free
        age = np.where(idle, self.stamp + 1, self._clock + 2)
        age[free] = 0
        order = np.sort(age * num_slots + np.arange(num_slots), axis=1)
        return order, np.count_nonzero(free | idle, axis=1)
