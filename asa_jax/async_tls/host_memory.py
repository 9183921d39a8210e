"""Host memory for whole caches: refused at once where there is not enough of it."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from asa_jax.errors import UserError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Small, so that a layer of one row is work for all threads: pages that are new to a virtual machine
# came at 0.4 GB/s a thread.
_PART_BYTES = 2**24


class HostMemoryError(UserError):
    """The host has not the memory for keys and values: found before the first token."""


def allocate_host(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocates zeros that the machine really has room for.

    Args:
        shape: of the array.
        dtype: of the array.

    Returns:
        The array, each of its pages written: a system that promises memory it has not would
        otherwise end the process tokens later.

    Raises:
        HostMemoryError: there is not enough.
    """
    needed = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    available = system_available_bytes()
    check_host_memory(needed, available)
    try:
        array = np.empty(shape, dtype)
    except MemoryError:
        raise _error(needed, available) from None
    _touch(array.reshape(-1).view(np.uint8))
    return array


def _touch(array: np.ndarray) -> None:
    """Writes zeros; the system makes pages as fast as threads ask for them."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = range(0, len(array), _PART_BYTES)
        list(pool.map(lambda first: array[first : first + _PART_BYTES].fill(0), parts))


def check_host_memory(needed_bytes: int, available_bytes: int) -> None:
    """Raises a HostMemoryError unless so many bytes are free."""
    if needed_bytes > available_bytes:
        raise _error(needed_bytes, available_bytes)


def _error(needed_bytes: int, available_bytes: int) -> HostMemoryError:
    return HostMemoryError(
        f"async_tls: keys and values need {needed_bytes} bytes of host memory and "
        f"{available_bytes} are free; use fewer rows or a shorter cache"
    )


def system_available_bytes() -> int:
    """Bytes that this process can still allocate, by the system and by its control group."""
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is no limit
        used = int((_CGROUP / "memory.current").read_text())
        causes = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Files that were read stay in memory until somebody needs it, and count as used till then.
        used -= int(causes["active_file"]) + int(causes["inactive_file"])
    except (OSError, ValueError, KeyError):
        return available
    return min(available, limit - used)
