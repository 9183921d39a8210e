"""The processes of a run on many hosts: joining them, agreeing, noticing that one is gone.

One process pays nothing for any of it.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from asa_jax.errors import ConfigError, UserError
from asa_jax.launch import Launch

# Network file systems show a new file to all hosts within this time.
VISIBLE_SECONDS = 60.0
# How the failures of collectives, of barriers and of the distributed runtime begin or what they
# name: gloo raises ValueError, the others JaxRuntimeError.
_LOST = re.compile(
    r"gloo|nccl|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|barrier|heartbeat|coordination", re.IGNORECASE
)


@contextmanager
def joined(launch: Launch) -> Iterator[None]:
    """Joins the processes of a run; must be entered before jax touches a device.

    Left without an error, it waits for the other processes to come there too.

    Args:
        launch: of `read_launch`.

    Raises:
        ConfigError: jax cannot find the other processes.
        UserError: another process ended or cannot be reached.
    """
    if launch.alone:
        yield
        return
    _join(launch)
    if launch.process_id:
        for name in ("asa_jax", "pallas_kernels"):
            logging.getLogger(name).setLevel(logging.ERROR)  # process 0 warns for all
    try:
        yield
        jax.distributed.shutdown()
    except (ValueError, RuntimeError) as error:
        if not is_lost_process(error):
            raise
        raise UserError(
            f"process {launch.process_id}: another process ended or cannot be reached "
            f"({str(error).splitlines()[0][:200]}); its own output says why; the same command on "
            "all hosts goes on from the last checkpoint"
        ) from error


def _join(launch: Launch) -> None:
    explicit = launch.launcher == "flags"
    try:
        jax.distributed.initialize(
            launch.coordinator_address,
            launch.num_processes if explicit else None,
            launch.process_id if explicit else None,
            # All devices of a host belong to its process, unless the launcher says otherwise.
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=launch.join_timeout_seconds,
            heartbeat_timeout_seconds=launch.heartbeat_timeout_seconds,
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ConfigError(
            f"{launch.launcher} started this process, but jax finds no others ({reason}); give "
            "--coordinator_address, --num_processes and --process_id, or --num_processes=1 to run "
            "alone"
        ) from error


def is_lost_process(error: BaseException | None) -> bool:
    """Whether an error says that another process ended or cannot be reached."""
    if jax.process_count() == 1 or not isinstance(error, ValueError | RuntimeError):
        return False
    return bool(_LOST.search(str(error)))


def from_first_process(value: Callable[[], int]) -> int:
    """Calls `value` on process 0 alone and returns on all what it gives there, 32 bits."""
    if jax.process_count() == 1:
        return value()
    mine = value() if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(mine)))


def on_all_processes(condition: bool) -> bool:
    """Whether `condition` holds on every process."""
    if jax.process_count() == 1:
        return condition
    return bool(np.all(multihost_utils.process_allgather(np.int32(condition))))


def wait_for_all(name: str) -> None:
    """Returns when every process is at the point of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_shared(file: Path) -> None:
    """Refuses a run directory that only some processes see.

    Args:
        file: of the run directory, written by process 0 before.

    Raises:
        ConfigError: on all processes, if one does not see it.
    """
    if not on_all_processes(_appears(file)):
        raise ConfigError(
            f"--workdir={file.parent}: must lie on a file system that all processes share; not "
            "all of them see what process 0 wrote there"
        )


def _appears(file: Path) -> bool:
    """Waits for a file that another host wrote; network file systems remember that it was not."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    return file.exists()
