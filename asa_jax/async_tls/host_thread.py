"""Back end B1: blocks are gathered by host threads and sent by `device_put`, one piece a transfer.

Where the device has pinned host memory the gathered blocks pass through it, because copies from
pageable memory are several times slower. Numbers of blocks are padded to powers of two, so that few
programs are compiled.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.host_memory import allocate_host
from asa_jax.async_tls.transfers import TransferError

# After which a transfer that is waited for counts as lost.
PATIENCE_SECONDS = 60.0
_PINNED = "pinned_host"


class HostThreadBackend:
    """See `transfers.Backend`; a transfer is the future of its staged blocks."""

    def __init__(
        self,
        num_rows: int,
        num_blocks: int,
        num_slots: int,
        block_size: int,
        width: int,
        dtype: np.dtype,
        *,
        device: jax.Device,
        num_threads: int,
    ) -> None:
        """Allocates the host's cache and the pool.

        Args:
            num_rows: key heads of all sequences, B * K.
            num_blocks: of a row in host memory.
            num_slots: of a row in the pool.
            block_size: tokens of a block.
            width: numbers of a token, key and value.
            dtype: of keys and values.
            device: that holds the pool.
            num_threads: of the host that gather blocks.

        Raises:
            HostMemoryError: the host has no room for the cache.
        """
        block = (block_size, width)
        self.host = allocate_host((num_rows, num_blocks, *block), np.dtype(dtype))
        on_device = jax.sharding.SingleDeviceSharding(device)
        pinned = _PINNED in {memory.kind for memory in device.addressable_memories()}
        # Where blocks go, one after the other.
        self._way = [on_device.with_memory_kind(_PINNED)] * pinned + [on_device]
        self._pool = jnp.zeros((num_rows, num_slots, *block), dtype, device=on_device)
        self.num_slots = num_slots
        self.block_bytes = self.host[0, 0].nbytes
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="async_tls")

    @property
    def pool(self) -> jax.Array:
        """See `transfers.Backend`; the array is given away at the next change of slots."""
        return self._pool

    def close(self) -> None:
        """Ends the threads; transfers that have not begun are given up."""
        self._threads.shutdown(cancel_futures=True)

    def start_fetch(self, rows: np.ndarray, blocks: np.ndarray) -> Any:
        """See `transfers.Backend`."""
        size = padded_size(len(rows))
        return self._threads.submit(self._bring, pad(rows, size, 0), pad(blocks, size, 0))

    def start_flush(self, rows: np.ndarray, slots: np.ndarray) -> Future:
        """See `transfers.Backend`."""
        size = padded_size(len(rows))
        staged = _read(self._pool, pad(rows, size, 0), pad(slots, size, 0))
        staged.copy_to_host_async()
        return self._threads.submit(np.asarray, staged)

    def landed(self, transfer: Any) -> bool:
        """See `transfers.Backend`."""
        if transfer.done():
            self.wait(transfer)
        return transfer.done()

    def wait(self, transfer: Any) -> None:
        """See `transfers.Backend`."""
        try:
            transfer.result(PATIENCE_SECONDS)
        except FutureTimeoutError:
            raise TransferError(
                f"a transfer of blocks did not land in {PATIENCE_SECONDS:g} seconds"
            ) from None
        except Exception as error:
            reason = " ".join(str(error).split())
            raise TransferError(f"a transfer of blocks failed ({reason})") from error

    def place(self, transfer: Any, which: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> None:
        """See `transfers.Backend`."""
        staged = transfer.result()
        size = staged.shape[0]
        nowhere = self.num_slots  # where a write is dropped
        self._pool = _place(
            self._pool,
            staged,
            pad(which, size, 0),
            pad(rows, size, 0),
            pad(slots, size, nowhere),
        )

    def store(
        self, transfer: Future, which: np.ndarray, rows: np.ndarray, blocks: np.ndarray
    ) -> None:
        """See `transfers.Backend`."""
        self.host[rows, blocks] = transfer.result()[which]

    def store_prompt(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """See `transfers.Backend`."""
        self.host[rows, : tokens.shape[1]] = tokens

    def write_tokens(
        self, rows: np.ndarray, slots: np.ndarray, offsets: np.ndarray, tokens: Any
    ) -> None:
        """See `transfers.Backend`."""
        self._pool = _write_tokens(self._pool, rows, slots, offsets, tokens)

    def _bring(self, rows: np.ndarray, blocks: np.ndarray) -> jax.Array:
        staged = self.host[rows, blocks]
        for place in self._way:
            staged = jax.device_put(staged, place)
        return jax.block_until_ready(staged)


def padded_size(count: int) -> int:
    """The power of two that is not below a number of blocks."""
    return 1 << (count - 1).bit_length()


def pad(numbers: np.ndarray, size: int, with_: int) -> np.ndarray:
    """Numbers as int32 [size], the last ones `with_`."""
    padded = np.full(size, with_, np.int32)
    padded[: len(numbers)] = numbers
    return padded


@jax.jit
def _read(pool: jax.Array, rows: jax.Array, slots: jax.Array) -> jax.Array:
    return pool[rows, slots]


@jax.jit(donate_argnums=0)
def _place(
    pool: jax.Array, staged: jax.Array, which: jax.Array, rows: jax.Array, slots: jax.Array
) -> jax.Array:
    return pool.at[rows, slots].set(staged[which], mode="drop")


@jax.jit(donate_argnums=0)
def _write_tokens(
    pool: jax.Array, rows: jax.Array, slots: jax.Array, offsets: jax.Array, tokens: jax.Array
) -> jax.Array:
    return pool.at[rows, slots, offsets].set(tokens.astype(pool.dtype))
