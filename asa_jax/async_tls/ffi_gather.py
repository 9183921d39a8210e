"""Back end B3: a kernel on a stream of its own gathers blocks from pinned memory of the host.

What is brought to the host goes the way of back end B1.
"""

import weakref
from typing import Any

import jax
import numpy as np

from asa_jax.async_tls.gather_library import GatherUnavailableError
from asa_jax.async_tls.host_thread import HostThreadBackend, pad, padded_size
from asa_jax.async_tls.pinned_blocks import NUM_CTAS, Gather, PinnedBlocks, place, start
from asa_jax.async_tls.pool_exchange import exchange_works
from asa_jax.async_tls.transfers import TransferError
from asa_jax.errors import UserError

_start = jax.jit(start, static_argnums=(1, 2))
_place = jax.jit(place, donate_argnums=0)


class FfiGatherBackend(HostThreadBackend):
    """See `transfers.Backend`; a fetch is a `Gather`, a flush the future of its blocks."""

    def __init__(self, *sizes: Any, num_ctas: int = NUM_CTAS, **options: Any) -> None:
        """Allocates the host's cache, pins it, and allocates the pool.

        Args:
            *sizes: as of `HostThreadBackend`.
            num_ctas: thread blocks of a gather.
            **options: as of `HostThreadBackend`.

        Raises:
            GatherUnavailableError: the gather cannot be built here.
            HostMemoryError: the host has no room for the cache, or not so much to pin.
        """
        super().__init__(*sizes, **options)
        self._num_ctas = num_ctas
        self._block = jax.ShapeDtypeStruct(self._pool.shape[2:], self._pool.dtype)

    def close(self) -> None:
        """Waits for what is on its way and gives thread, stream and pinned memory back.

        Raises:
            TransferError: a gather does not end, and so its memory is not given back.
        """
        super().close()
        self._pinned.close(self._patience_seconds)

    def start_fetch(self, rows: np.ndarray, blocks: np.ndarray) -> Gather:
        """See `transfers.Backend`."""
        if not self._pinned.is_open:
            return self._pinned.watch(TransferError("the back end is closed"))
        numbers = rows.astype(np.int64) * self.host.shape[1] + blocks
        request = self._pinned.request(pad(numbers, padded_size(len(rows)), -1))
        try:
            with jax.default_device(self._device):
                return self._pinned.watch(_start(request, self._block, self._num_ctas))
        except jax.errors.JaxRuntimeError as error:
            return self._pinned.watch(error)

    def place(
        self, transfer: Gather, which: np.ndarray, rows: np.ndarray, slots: np.ndarray
    ) -> None:
        """See `transfers.Backend`."""
        staged = transfer.result()
        size = len(staged.blocks)
        numbers = rows.astype(np.int64) * self.num_slots + slots
        self._pool = _place(self._pool, staged, pad(which, size, 0), pad(numbers, size, -1))

    def _allocate(
        self, shape: tuple[int, ...], dtype: np.dtype, device: jax.Device, available: int | None
    ) -> np.ndarray:
        self._device = device
        self._pinned = PinnedBlocks(shape, dtype, device, available)
        # Of a back end that nobody closed; when the process ends the system does it.
        weakref.finalize(self, self._pinned.close).atexit = False
        return self._pinned.host


def check_ffi_gather(device: jax.Device) -> None:
    """Brings a few blocks to a device and compares them.

    Raises:
        GatherUnavailableError: the gather cannot be built, does not work or brings something else.
    """
    numbers = np.arange(8)
    try:
        backend = FfiGatherBackend(
            1, 8, 8, 64, 256, np.dtype(np.float32), device=device, num_threads=1
        )
        try:
            backend.host[:] = np.random.default_rng(0).normal(size=backend.host.shape)
            transfer = backend.start_fetch(0 * numbers, numbers[::-1])
            backend.wait(transfer)
            backend.place(transfer, numbers, 0 * numbers, numbers)
            same = np.array_equal(np.asarray(backend.pool), backend.host[:, ::-1])
        finally:
            backend.close()
        same = same and exchange_works(device)
    except GatherUnavailableError:
        raise
    except (UserError, RuntimeError) as error:
        raise GatherUnavailableError(f"its self-check failed: {error}") from None
    if not same:
        raise GatherUnavailableError("its self-check brought other numbers than the host holds")


def chosen_backend(asked: str, device: jax.Device) -> tuple[str, str]:
    """What `backend=auto` means on this machine, and why.

    Args:
        asked: one of `settings.BACKENDS`.
        device: that decodes.

    Returns:
        The back end, and a line for people.

    Raises:
        GatherUnavailableError: ffi_gather was asked for and does not work.
    """
    if asked == "auto" and device.platform != "gpu":
        return "host_thread", "async_tls: back end host_thread (no GPU)"
    if asked not in ("auto", "ffi_gather"):
        return asked, f"async_tls: back end {asked}"
    try:
        check_ffi_gather(device)
    except GatherUnavailableError as error:
        if asked == "ffi_gather":
            raise GatherUnavailableError(
                f"config.async_tls.backend = 'ffi_gather': {error}; use host_thread"
            ) from None
        return "host_thread", f"async_tls: back end host_thread (ffi_gather: {error})"
    return "ffi_gather", "async_tls: back end ffi_gather"
