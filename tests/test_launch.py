"""Which process of how many this is: by flags, by what launchers set, or alone."""

import subprocess
import sys

import pytest

from asa_jax.errors import ConfigError
from asa_jax.flags import PROJECT
from asa_jax.launch import LAUNCHERS, detect_launcher, refuse_many_processes

SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[1-4]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"
}  # fmt: skip
KUBERNETES = {"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
MANY = {"Slurm": SLURM, "Open MPI": OPEN_MPI, "Kubernetes": KUBERNETES}

READ = """
import sys
from asa_jax.flags import exit_on_error, parse_arguments
from asa_jax.launch import define_launch_flags, read_launch
def read():
    define_launch_flags()
    parse_arguments()
    return read_launch()
launch = exit_on_error(read)
assert "jax" not in sys.modules
print(launch.launcher, launch.process_id, launch.num_processes, launch.coordinator_address)
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for variables in LAUNCHERS.values():
        for variable in variables:
            monkeypatch.delenv(variable, raising=False)


def _read(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", READ, *arguments], cwd=PROJECT, capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr.strip(), done.returncode


def _set(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_flags_tell_all():
    flags = ("--coordinator_address=host:1234", "--num_processes=3", "--process_id=2")
    assert _read(*flags) == ("flags 2 3 host:1234", 0)


def test_alone_by_default_and_by_flag(monkeypatch):
    assert _read() == ("None 0 1 None", 0)
    _set(monkeypatch, SLURM)
    assert _read() == ("Slurm 3 4 None", 0)
    assert _read("--num_processes=1") == ("None 0 1 None", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--process_id=0"], "--coordinator_address: missing; give"),
        (["--coordinator_address=h:1", "--num_processes=2"], "--process_id: missing; give"),
        (
            ["--coordinator_address=h", "--num_processes=2", "--process_id=0"],
            "--coordinator_address=h: must be host:port",
        ),
        (
            ["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2: must be below --num_processes=2",
        ),
        (["--num_processes=0"], "num_processes"),
    ],
)
def test_wrong_flags(arguments, message):
    line, code = _read(*arguments)
    assert code == 2 and message in line and len(line.splitlines()) == 1


@pytest.mark.parametrize("name", MANY)
def test_launchers_are_detected_by_all_of_their_variables(monkeypatch, name):
    _set(monkeypatch, MANY[name])
    assert detect_launcher() == name
    monkeypatch.delenv(LAUNCHERS[name][-1])
    assert detect_launcher() is None


def test_a_launcher_that_started_one_process_is_no_launcher(monkeypatch):
    _set(monkeypatch, SLURM | {"SLURM_NTASKS": "1"})
    assert detect_launcher() is None


@pytest.mark.parametrize("name", MANY)
def test_commands_of_one_process_refuse_to_be_many(monkeypatch, name):
    refuse_many_processes("eval.py")
    _set(monkeypatch, MANY[name])
    with pytest.raises(ConfigError, match=f"eval.py works in one process, and {name} started"):
        refuse_many_processes("eval.py")


@pytest.mark.parametrize("command", ["eval.py", "generate.py"])
def test_the_commands_refuse_at_once(monkeypatch, command):
    _set(monkeypatch, SLURM)
    done = subprocess.run(
        [sys.executable, command, "--workdir=w"], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {command} works in one process, and Slurm started")
