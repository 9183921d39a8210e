"""Back end B0: pool and host are numpy arrays, and transfers land when they are told to.

It is the oracle of the other back ends, and where failures are injected: a transfer can take any
number of ticks, or fail.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from asa_jax.async_tls.host_memory import allocate_host
from asa_jax.async_tls.transfers import TransferError

FAILS = -1
# Ticks after which a transfer that is waited for counts as lost.
PATIENCE_TICKS = 100


@dataclasses.dataclass
class SimulatedTransfer:
    """Blocks on their way; `staging` is filled when it lands."""

    source: np.ndarray
    ticks: int
    staging: np.ndarray


class SimulatedBackend:
    """See `transfers.Backend`; every call of `landed` is one tick of the transfer's clock."""

    def __init__(
        self,
        num_rows: int,
        num_blocks: int,
        num_slots: int,
        block_size: int,
        width: int,
        dtype: np.dtype,
        *,
        ticks_of: Callable[[], int] = lambda: 0,
    ) -> None:
        """Allocates the host's cache and the pool.

        Args:
            num_rows: key heads of all sequences, B * K.
            num_blocks: of a row in host memory.
            num_slots: of a row in the pool.
            block_size: tokens of a block.
            width: numbers of a token, key and value.
            dtype: of keys and values.
            ticks_of: asked for each transfer, how many ticks it takes; FAILS for one that fails.

        Raises:
            HostMemoryError: the host has no room for the cache.
        """
        block = (block_size, width)
        self.host = allocate_host((num_rows, num_blocks, *block), dtype)
        self._pool = np.zeros((num_rows, num_slots, *block), dtype)
        self.num_slots = num_slots
        self.block_bytes = self._pool[0, 0].nbytes
        self._ticks_of = ticks_of

    @property
    def pool(self) -> np.ndarray:
        """A copy: JAX may read an array of numpy's after it took it, and slots change in place."""
        return self._pool.copy()

    def close(self) -> None:
        """See `transfers.Backend`; nothing works beside."""

    def start_fetch(self, rows: np.ndarray, blocks: np.ndarray) -> SimulatedTransfer:
        """See `transfers.Backend`."""
        return self._start(self.host[rows, blocks])

    def start_flush(self, rows: np.ndarray, slots: np.ndarray) -> SimulatedTransfer:
        """See `transfers.Backend`."""
        return self._start(self._pool[rows, slots])

    def landed(self, transfer: SimulatedTransfer) -> bool:
        """See `transfers.Backend`."""
        if transfer.ticks == FAILS:
            raise TransferError(f"the transfer of {len(transfer.source)} blocks failed")
        if transfer.ticks:
            transfer.ticks -= 1
            return False
        transfer.staging[:] = transfer.source
        return True

    def wait(self, transfer: SimulatedTransfer) -> None:
        """See `transfers.Backend`."""
        for _ in range(PATIENCE_TICKS):
            if self.landed(transfer):
                return
        number = len(transfer.source)
        raise TransferError(
            f"the transfer of {number} blocks did not land in {PATIENCE_TICKS} ticks"
        )

    def place(
        self, transfer: SimulatedTransfer, which: np.ndarray, rows: np.ndarray, slots: np.ndarray
    ) -> None:
        """See `transfers.Backend`."""
        self._pool[rows, slots] = transfer.staging[which]

    def store(
        self, transfer: SimulatedTransfer, which: np.ndarray, rows: np.ndarray, blocks: np.ndarray
    ) -> None:
        """See `transfers.Backend`."""
        self.host[rows, blocks] = transfer.staging[which]

    def store_prompt(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """See `transfers.Backend`."""
        self.host[rows, : tokens.shape[1]] = tokens

    def write_tokens(
        self, rows: np.ndarray, slots: np.ndarray, offsets: np.ndarray, tokens: np.ndarray
    ) -> None:
        """See `transfers.Backend`."""
        self._pool[rows, slots, offsets] = np.asarray(tokens)

    def _start(self, source: np.ndarray) -> SimulatedTransfer:
        # What is read before it landed is to be seen as wrong.
        staging = np.full_like(source, np.nan)
        return SimulatedTransfer(source, self._ticks_of(), staging)
