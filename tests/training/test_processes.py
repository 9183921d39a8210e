"""Two processes on one machine, over loopback: train.py as on many hosts."""

import fcntl
import itertools
import re
import shutil
import signal
import socket
import time

import chex
import numpy as np
import pytest

from asa_jax.errors import ConfigError
from asa_jax.launch import Launch
from asa_jax.training import processes
from asa_jax.training.metrics import read_metrics
from tests.training.commands import STEPS, final_params, losses, wait_for

HEARTBEAT_SECONDS = 10


def _flags(port, process):
    return (
        f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", f"--process_id={process}"
    )  # fmt: skip


def _slurm_variables(port, process):
    """What srun sets, as far as jax and we read it."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process),
        "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


@pytest.fixture
def start_pair(start):
    """Returns start_pair(workdir, *more flags): the two processes."""
    runs = itertools.count()

    def run(workdir, *more, slurm=False):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        number, more = next(runs), (*more, f"--heartbeat_timeout_seconds={HEARTBEAT_SECONDS}")
        return [
            start(
                workdir,
                *more,
                *(() if slurm else _flags(port, process)),
                output=f"output-{number}-{process}",
                **(_slurm_variables(port, process) if slurm else {}),
            )
            for process in range(2)
        ]

    return run


def _output(workdir, run, process):
    return (workdir.parent / f"output-{run}-{process}").read_text()


def _checkpoints(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal())


def test_two_processes_train_as_one_and_survive(finished, start_pair, train, tmp_path):
    """Killed, resumed on another mesh, stopped by a signal to one, finished by a single process."""
    workdir = tmp_path / "run"
    pair = start_pair(workdir)
    wait_for((workdir / "config.json").exists)
    second = train(workdir)
    assert second.returncode == 1 and "a trainer works here already" in second.stderr

    wait_for(lambda: _checkpoints(workdir))
    pair[1].kill()
    died = time.monotonic()
    code = pair[0].wait(6 * HEARTBEAT_SECONDS)
    print(f"the other process ended {time.monotonic() - died:.1f} s after it with {code}")
    assert code in (1, -signal.SIGABRT)
    if code == 1:  # else it waited for a save, and the runtime's heartbeat ended it
        *_, line = _output(workdir, 0, 0).splitlines()
        assert line.startswith("error: process 0: another process ended or cannot be reached (")
    saved = _checkpoints(workdir)[-1]
    assert saved in (20, 40)

    # A newer step that is damaged: the first process passes over it for both.
    newer = workdir / "checkpoints" / str(saved + 1)
    shutil.copytree(workdir / "checkpoints" / str(saved), newer)
    (newer / "params" / "manifest.ocdbt").write_bytes(b"")
    # Found by jax as those of srun, on a mesh that divides the heads: both read all rows.
    pair = start_pair(workdir, "--config.mesh.data=1", "--config.mesh.tensor=2", slurm=True)
    wait_for(lambda: "Gloo" in _output(workdir, 1, 1))  # they have joined
    pair[1].send_signal(signal.SIGTERM)
    assert [process.wait(120) for process in pair] == [143, 143]
    output = _output(workdir, 1, 0)
    assert f"{newer}: passed over: params/manifest.ocdbt is not as it was" in output
    assert f"resumes after step {saved} of {STEPS}" in output
    (stopped,) = re.findall(r"stopped after step (\d+)", output)
    assert saved < int(stopped) < STEPS
    assert _checkpoints(workdir)[-1] == int(stopped)
    # The second process is silent, but for what the collectives say of themselves.
    assert "step" not in _output(workdir, 1, 1)

    done = train(workdir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"resumes after step {stopped} of {STEPS}")
    steps = [line["step"] for line in read_metrics(workdir) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    expected, found = (
        np.array([x[1] for x in losses(folder) if x[1]]) for folder in (finished[0], workdir)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    chex.assert_trees_all_close(final_params(workdir), final_params(finished[0]), atol=1e-3)


@pytest.mark.slow
def test_the_sequence_is_divided_over_processes(train, start_pair, tmp_path):
    """Halos and gathered latents travel between them."""
    flags = (
        "--config.model.layer_kinds=('local','global')", "--config.training.steps=20",
        "--config.training.eval_every_steps=0",
    )  # fmt: skip
    assert train(tmp_path / "one", *flags).returncode == 0
    mesh = ("--config.mesh.data=1", "--config.mesh.context=2")
    pair = start_pair(tmp_path / "two", *flags, *mesh)
    assert [process.wait(200) for process in pair] == [0, 0]
    expected, found = (
        np.array([x[1] for x in losses(tmp_path / name) if x[1]]) for name in ("one", "two")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)], ids=["first-dies", "hangs"]
)
def test_no_process_waits_for_ever(start_pair, tmp_path, process, number):
    """The process that the others report to is lost, or one falls silent and closes nothing."""
    workdir = tmp_path / "run"
    pair = start_pair(workdir, "--config.training.checkpoint_every_steps=5")
    wait_for(lambda: _checkpoints(workdir))
    pair[process].send_signal(number)
    began = time.monotonic()
    assert pair[1 - process].wait(6 * HEARTBEAT_SECONDS) != 0
    print(f"ended {time.monotonic() - began:.1f} s later")


def test_processes_that_never_come_are_not_waited_for(start_pair, start, tmp_path):
    """The first process is refused the directory, so the second waits for nobody."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    with (workdir / "train.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        pair = start_pair(workdir, "--join_timeout_seconds=5")
        assert pair[0].wait(60) == 1
        assert pair[1].wait(120) != 0
    assert "a trainer works here already" in _output(workdir, 0, 0)
    print(f"both ended {time.monotonic() - began:.1f} s after their start")


def test_a_directory_that_a_process_does_not_see_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "VISIBLE_SECONDS", 0)
    with pytest.raises(ConfigError, match="must lie on a file system that all processes share"):
        processes.check_shared(tmp_path / "config.json")


def test_a_launcher_that_jax_cannot_ask_is_named(monkeypatch):
    """As on Kubernetes without its package, or with Open MPI 5 and without mpi4py."""

    def refuse(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", refuse)
    launch = Launch("Kubernetes", process_id=1, num_processes=None)
    with (
        pytest.raises(ConfigError, match=r"Kubernetes started .* --num_processes=1 to run alone"),
        processes.joined(launch),
    ):
        pass
