"""Where this process stands among those of its run, by flags or by what a launcher has set.

Imports no jax: it is known before jax is imported whether this is the process that owns the run
directory. The processes join in `asa_jax.training.processes`.
"""

import os
from typing import NamedTuple

from absl import flags

from asa_jax.errors import ConfigError

COORDINATOR = "coordinator_address"
# Variables of a launcher: the index of a process, then what else it always sets. Of the same
# variables jax's cluster detection takes the rest, the address of process 0 among it.
LAUNCHERS = {
    "Slurm": (
        "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"
    ),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "Kubernetes": ("JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"),
}  # fmt: skip
SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


class Launch(NamedTuple):
    """How this process was started.

    Attributes:
        launcher: name of what started the processes, 'flags' where flags tell; None: it is alone.
        process_id: index of this process.
        num_processes: how many there are, None where only jax can tell.
        coordinator_address: host:port of process 0, None where jax finds it.
        join_timeout_seconds: how long the others are waited for at the start.
        heartbeat_timeout_seconds: silence after which a process counts as dead.
    """

    launcher: str | None = None
    process_id: int = 0
    num_processes: int | None = 1
    coordinator_address: str | None = None
    join_timeout_seconds: int = 300
    heartbeat_timeout_seconds: int = 100

    @property
    def alone(self) -> bool:
        return self.launcher is None


def define_launch_flags() -> None:
    """Defines the flags of a command that can run as many processes."""
    flags.DEFINE_string(COORDINATOR, None, "host:port of process 0, where no launcher is detected")
    flags.DEFINE_integer(
        "num_processes", None, "processes of the run; 1: alone, whatever is detected", lower_bound=1
    )
    flags.DEFINE_integer("process_id", None, "index of this process", lower_bound=0)
    flags.DEFINE_integer(
        "join_timeout_seconds", 300, "wait for all processes at the start", lower_bound=1
    )
    flags.DEFINE_integer(
        "heartbeat_timeout_seconds", 100, "silence after which a process counts as dead",
        lower_bound=1,
    )  # fmt: skip


def read_launch() -> Launch:
    """Reads the parsed flags and the environment.

    Raises:
        ConfigError: some of the three flags are missing, or wrong.
    """
    given = flags.FLAGS
    names = (COORDINATOR, "num_processes", "process_id")
    missing = [name for name in names if given[name].value is None]
    timeouts = given.join_timeout_seconds, given.heartbeat_timeout_seconds
    if given.num_processes == 1:
        return Launch()
    if not missing:
        _check(given.coordinator_address, given.num_processes, given.process_id)
        return Launch(
            "flags", given.process_id, given.num_processes, given.coordinator_address, *timeouts
        )
    if len(missing) < len(names):
        raise ConfigError(
            f"--{missing[0]}: missing; give --{', --'.join(names)} together, or none of them"
        )
    launcher = detect_launcher()
    if launcher is None:
        return Launch()
    return Launch(launcher, _number(LAUNCHERS[launcher][0]), _size(launcher), None, *timeouts)


def refuse_many_processes(command: str) -> None:
    """Refuses to run a command that works in one process as one of many.

    Raises:
        ConfigError: a launcher started more than one.
    """
    launcher = detect_launcher()
    # On Kubernetes the number is not known, but all processes after the first know enough.
    if launcher and (_size(launcher) or _number(LAUNCHERS[launcher][0]) + 1) > 1:
        raise ConfigError(
            f"{command} works in one process, and {launcher} started several; start one, which "
            "uses all devices of its host"
        )


def detect_launcher() -> str | None:
    """The launcher that started this process as one of many, by its variables."""
    for name, variables in LAUNCHERS.items():
        if all(variable in os.environ for variable in variables) and _size(name) != 1:
            return name
    return None


def _size(launcher: str) -> int | None:
    for variable in LAUNCHERS[launcher]:
        if variable in SIZES:
            return _number(variable)
    return None


def _number(variable: str) -> int:
    value = os.environ[variable]
    if not value.isdecimal():
        raise ConfigError(f"{variable}={value}: the launcher must set it to a number")
    return int(value)


def _check(address: str, num_processes: int, process_id: int) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--{COORDINATOR}={address}: must be host:port")
    if process_id >= num_processes:
        raise ConfigError(
            f"--process_id={process_id}: must be below --num_processes={num_processes}"
        )
