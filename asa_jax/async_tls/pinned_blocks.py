"""Blocks in pinned memory of the host, gathered beside what a device computes.

`PinnedBlocks.request`, `start` and `place` also work inside one jitted program: what is computed
between `start` and `place` runs beside the gather.
"""

import ctypes
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.gather_library import PLACE, START, load_library
from asa_jax.async_tls.host_memory import HostMemoryError, allocate_host
from asa_jax.async_tls.transfers import TransferError

# Few thread blocks fill the bus and leave the others to what is computed meanwhile.
NUM_CTAS = 16
_PAGE_BYTES = 4096
_POLL_SECONDS = 2e-5
# That a device may still read: their memory must not become another's.
_abandoned: list["PinnedBlocks"] = []
_UNKNOWN, _LANDED, _FAILED = -1, 1, 2


class Staged(NamedTuple):
    """Results of `start`: blocks [n, ...] that may not have landed, and what the gather reads."""

    blocks: jax.Array
    request: jax.Array


def start(request: Any, block: jax.ShapeDtypeStruct, num_ctas: int = NUM_CTAS) -> Staged:
    """Starts a gather on the side stream and does not wait for it.

    Args:
        request: int32 [3 + n], of `PinnedBlocks.request`.
        block: shape and dtype of one.
        num_ctas: thread blocks of the gather.

    Returns:
        For `place`; both arrays must live until the gather landed.
    """
    number = request.shape[0] - 3
    results = (
        jax.ShapeDtypeStruct((number, *block.shape), block.dtype),
        jax.ShapeDtypeStruct(request.shape, jnp.int32),
    )
    call = jax.ffi.ffi_call(START, results, has_side_effect=True)
    return Staged(*call(request, num_ctas=np.int64(num_ctas)))


def place(pool: jax.Array, staged: Staged, which: Any, slots: Any) -> jax.Array:
    """Waits, on the device, until a gather landed and copies its blocks to a pool.

    Args:
        pool: [rows, slots of a row, ...], changed in place where it is donated.
        staged: of `start`, once.
        which: int32 [m], numbers of staged blocks.
        slots: int32 [m], numbers of slots, row after row; -1: the block is copied nowhere.

    Returns:
        The pool.
    """
    result = jax.ShapeDtypeStruct(pool.shape, pool.dtype)
    call = jax.ffi.ffi_call(PLACE, result, has_side_effect=True, input_output_aliases={0: 0})
    return call(pool, staged.blocks, staged.request, which, slots)


class Gather:
    """Blocks on their way, with the interface of a future."""

    def __init__(self, owner: "PinnedBlocks", staged: Staged | Exception) -> None:
        """Takes the results of a started gather, or why it did not start."""
        self._owner, self._staged = owner, staged
        self._landed = False

    def done(self) -> bool:
        """Whether the blocks are there, or never will be."""
        if isinstance(self._staged, Staged) and not self._landed:
            try:
                self._landed = self._owner.has_landed(self._staged)
            except (TransferError, jax.errors.JaxRuntimeError) as error:
                self._staged = error
        return self._landed or isinstance(self._staged, Exception)

    def result(self, timeout: float | None = None) -> Staged:
        """The landed blocks; raises TimeoutError, or what went wrong."""
        until = time.monotonic() + timeout if timeout is not None else float("inf")
        while not self.done():
            if time.monotonic() > until:
                raise TimeoutError
            time.sleep(_POLL_SECONDS)
        if isinstance(self._staged, Exception):
            raise self._staged
        return self._staged


class PinnedBlocks:
    """Host memory that a device reads, and its gathers; to be closed.

    Attributes:
        host: [rows, blocks, ...], all zeros at first.
        is_open: until `close`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        device: jax.Device,
        available_bytes: int | None = None,
    ) -> None:
        """Allocates and pins.

        Args:
            shape: rows, blocks of a row, and of a block.
            dtype: of the blocks.
            device: that reads them.
            available_bytes: of host memory; None for what the system says.

        Raises:
            GatherUnavailableError: the gather cannot be built.
            HostMemoryError: the host has not so much memory, or not so much to pin.
        """
        gpu = device.platform == "gpu"
        capability = device.compute_capability if gpu else ""
        self._library = load_library(device.platform, capability)
        self._device = ctypes.c_int(device.local_hardware_id if gpu else 0)
        self.host = _whole_pages(shape, dtype, available_bytes)
        self._memory = self.host.ctypes.data_as(ctypes.c_void_p)
        self._address = ctypes.c_void_p()
        self._gathers: list[Gather] = []
        self.is_open = False
        size = ctypes.c_int64(self.host.nbytes)
        self._check(self._library.AsaOpen(self._device))
        try:
            self._check(self._library.AsaPin(self._memory, size, ctypes.byref(self._address)))
        except HostMemoryError:
            self._library.AsaClose(self._device)
            raise
        self.is_open = True

    def source(self) -> np.ndarray:
        """The first three numbers of a request for these blocks."""
        address = np.array([self._address.value], np.uint64).view(np.int32)
        number = self.host.shape[0] * self.host.shape[1]
        return np.append(address, np.int32(number))

    def request(self, numbers: np.ndarray) -> np.ndarray:
        """What `start` is given for blocks [n], numbered row after row; -1 is brought nowhere."""
        return np.concatenate([self.source(), numbers.astype(np.int32)])

    def watch(self, staged: Staged | Exception) -> Gather:
        """A future of a gather; its buffers are kept until it landed, whoever forgets of it."""
        self._gathers = [gather for gather in self._gathers if not gather.done()]
        self._gathers.append(Gather(self, staged))
        return self._gathers[-1]

    def has_landed(self, staged: Staged) -> bool:
        """Whether a gather is complete.

        Raises:
            TransferError: it failed.
            JaxRuntimeError: it did not start.
        """
        blocks: Any = staged.blocks
        if not blocks.is_ready():
            return False  # the device has not come to start it
        buffer = ctypes.c_void_p(blocks.unsafe_buffer_pointer())
        message = ctypes.c_char_p()
        state = self._library.AsaState(self._device, buffer, ctypes.byref(message))
        if state == _UNKNOWN:
            raise TransferError("a gather of blocks was not started")
        if state == _FAILED:
            raise TransferError((message.value or b"").decode())
        return state == _LANDED

    def drain(self) -> None:
        """Waits until nothing that was started on the device is on its way, whoever started it."""
        self._library.AsaDrain(self._device)

    def close(self, patience_seconds: float = 60) -> None:
        """Waits for what is on its way, then ends the gather and frees the memory for others.

        Raises:
            TransferError: a gather does not end; the memory stays pinned, because it is read.
        """
        if not self.is_open:
            return
        for gather in self._gathers:
            try:
                gather.result(patience_seconds)
            except TimeoutError:
                _abandoned.append(self)
                raise TransferError("a gather of blocks does not end, its memory stays") from None
            except (TransferError, jax.errors.JaxRuntimeError):
                continue  # told when it was waited for, or of nobody's interest
        self.is_open, self._gathers = False, []
        self._library.AsaUnpin(self._memory)
        self._library.AsaClose(self._device)

    def _check(self, message: bytes | None) -> None:
        if message is not None:
            raise HostMemoryError(
                f"async_tls: {self.host.nbytes} bytes of host memory cannot be pinned "
                f"({message.decode()}); use fewer rows, a shorter cache or backend=host_thread"
            )


def _whole_pages(shape: tuple[int, ...], dtype: np.dtype, available: int | None) -> np.ndarray:
    """Zeros that share no page with other memory, so that pinning is theirs alone."""
    needed = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    padded = allocate_host(
        (-(-needed // _PAGE_BYTES) * _PAGE_BYTES + _PAGE_BYTES,), np.dtype(np.uint8), available
    )
    first = -padded.ctypes.data % _PAGE_BYTES
    return padded[first : first + needed].view(dtype).reshape(shape)
