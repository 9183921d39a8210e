"""What the engine asks of a back end that moves blocks between host and device.

A row is one key head of one sequence, b * K + k. A block is block_size tokens of `width` numbers,
the key and value of each side by side. A transfer fills a staging buffer; nothing reads the buffer
before `landed` or `wait` said that it is whole, and nothing but `place` and `store` writes pool and
host. So a transfer that comes late, or never, cannot show in what is read.
"""

from typing import Any, Protocol

import numpy as np


class TransferError(RuntimeError):
    """A transfer failed or did not land in time; its message is one line."""


class Backend(Protocol):
    """Moves blocks of host [rows, blocks] to and from slots of the pool [rows, slots]."""

    num_slots: int
    # of one block
    block_bytes: int

    @property
    def pool(self) -> Any:
        """The slots, [rows, num_slots, block_size, width], for attention to read."""

    def close(self) -> None:
        """Gives up what works beside the program; nothing else is to be called afterwards."""

    def start_fetch(self, rows: np.ndarray, blocks: np.ndarray) -> Any:
        """Starts to bring host[rows, blocks] to a staging buffer on the device."""

    def start_flush(self, rows: np.ndarray, slots: np.ndarray) -> Any:
        """Starts to bring pool[rows, slots] to a staging buffer on the host."""

    def landed(self, transfer: Any) -> bool:
        """Whether the staging buffer is whole. Raises TransferError if it never will be."""

    def wait(self, transfer: Any) -> None:
        """Waits until the staging buffer is whole. Raises TransferError if that takes too long."""

    def place(self, transfer: Any, which: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
        """Writes staged blocks number `which` of a landed fetch to pool[rows, slots]."""

    def store(self, transfer: Any, which: np.ndarray, rows: np.ndarray, blocks: np.ndarray) -> None:
        """Writes staged blocks number `which` of a landed flush to host[rows, blocks]."""

    def store_prompt(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Writes the blocks [n, m, block_size, width] of prompts to host[rows, :m]."""

    def write_tokens(
        self, rows: np.ndarray, slots: np.ndarray, offsets: np.ndarray, tokens: Any
    ) -> None:
        """Writes tokens [n, width] to pool[rows, slots, offsets]."""
