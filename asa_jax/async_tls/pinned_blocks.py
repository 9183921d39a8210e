"""Blocks in pinned memory of the host, which a side stream of the device reads and writes."""

import ctypes

import jax
import numpy as np

from asa_jax.async_tls.gather_library import load_library
from asa_jax.async_tls.host_memory import HostMemoryError, allocate_host
from asa_jax.async_tls.transfers import TransferError

_PAGE_BYTES = 4096


class PinnedBlocks:
    """Host memory that a device reads and writes; to be closed.

    Attributes:
        host: [rows, blocks, ...], all zeros at first.
        is_open: until `close`.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, device: jax.Device) -> None:
        """Allocates and pins.

        Args:
            shape: rows, blocks of a row, and of a block.
            dtype: of the blocks.
            device: that reads and writes them.

        Raises:
            GatherUnavailableError: what moves blocks cannot be built.
            HostMemoryError: the host has not so much memory, or not so much to pin.
        """
        gpu = device.platform == "gpu"
        capability = device.compute_capability if gpu else ""
        self._library = load_library(device.platform, capability)
        self._device = ctypes.c_int(device.local_hardware_id if gpu else 0)
        self.host = _whole_pages(shape, dtype)
        self._memory = self.host.ctypes.data_as(ctypes.c_void_p)
        self._address = ctypes.c_void_p()
        self.is_open = False
        self._check(self._library.AsaOpen(self._device))
        try:
            address = ctypes.byref(self._address)
            self._check(self._library.AsaPin(self._memory, self._num_bytes, address))
        except HostMemoryError:
            self._library.AsaClose(self._device)
            raise
        self.is_open = True

    @property
    def _num_bytes(self) -> ctypes.c_int64:
        return ctypes.c_int64(self.host.nbytes)

    def source(self) -> np.ndarray:
        """The first three numbers of a request for these blocks: `pool_exchange`."""
        address = np.array([self._address.value], np.uint64).view(np.int32)
        number = self.host.shape[0] * self.host.shape[1]
        return np.append(address, np.int32(number))

    def store(self, blocks: jax.Array) -> None:
        """Copies all blocks from the device, as fast as the bus carries them.

        Raises:
            TransferError: they did not come.
        """
        if (blocks.shape, blocks.dtype) != (self.host.shape, self.host.dtype):
            raise ValueError(f"blocks: {blocks.shape} of {blocks.dtype} are not as the host's")
        blocks.block_until_ready()
        source = ctypes.c_void_p(blocks.unsafe_buffer_pointer())
        message = self._library.AsaStore(self._device, self._memory, source, self._num_bytes)
        if message is not None:
            raise TransferError(f"blocks did not come to the host ({message.decode()})")

    def drain(self) -> None:
        """Waits until nothing that was started on the device is on its way, whoever started it."""
        self._library.AsaDrain(self._device)

    def close(self) -> None:
        """Waits for what is on its way, then frees the memory for others."""
        if not self.is_open:
            return
        self.is_open = False
        self.drain()
        self._library.AsaUnpin(self._memory)
        self._library.AsaClose(self._device)

    def _check(self, message: bytes | None) -> None:
        if message is not None:
            raise HostMemoryError(
                f"async_tls: {self.host.nbytes} bytes of host memory cannot be pinned "
                f"({message.decode()}); use fewer rows, a shorter cache or backend=host_thread"
            )


def _whole_pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that share no page with other memory, so that pinning is theirs alone."""
    needed = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    pages = -(-needed // _PAGE_BYTES) + 1
    padded = allocate_host((pages * _PAGE_BYTES,), np.dtype(np.uint8))
    first = -padded.ctypes.data % _PAGE_BYTES
    return padded[first : first + needed].view(dtype).reshape(shape)
