"""Runs of train.py that take a minute: on changing devices, and two thousand steps."""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from asa_jax.flags import PROJECT
from asa_jax.training.metrics import read_metrics
from tests.training.commands import wait_for


def _with_devices(environment, number):
    """Simulated devices in the place of `number` GPUs."""
    flags = f"{environment['XLA_FLAGS']} --xla_force_host_platform_device_count={number}"
    return environment | {"XLA_FLAGS": flags}


@pytest.mark.slow
def test_the_number_of_devices_changes_on_the_way(command, environment, tmp_path):
    """8, 4, 1 and 8 devices, ten steps each, give what one gives; so the batches are the same."""

    def run(name, steps, devices, *more):
        done = subprocess.run(
            [*command, f"--workdir={tmp_path / name}", f"--config.training.steps={steps}",
             "--config.optimizer.schedule=constant", "--config.optimizer.learning_rate=1e-3",
             *more],
            cwd=PROJECT, env=_with_devices(environment, devices), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"{devices} cpu" in done.stdout

    run("one", 40, 1)
    run("many", 10, 8, "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    run("many", 20, 4, "--config.mesh.fsdp=2")
    run("many", 30, 1)
    run("many", 40, 8)
    expected, found = (
        [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]
        for name in ("one", "many")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _files(workdir: Path) -> int:
    return sum(path.is_file() for path in workdir.rglob("*"))


@pytest.mark.slow
def test_two_thousand_steps_need_no_more_memory_files_or_compilation(
    start, environment, monkeypatch, tmp_path
):
    workdir, steps, warm = tmp_path / "run", 2000, 500
    monkeypatch.setitem(environment, "JAX_LOG_COMPILES", "1")
    process = start(
        workdir, f"--config.training.steps={steps}", "--config.training.log_every_steps=100",
        "--config.training.checkpoint_every_steps=100", "--config.training.eval_every_steps=100",
        "--config.optimizer.learning_rate=1e-3",
    )  # fmt: skip
    samples: list[tuple[int, int, int]] = []

    def sample():
        lines = read_metrics(workdir)
        if lines and process.poll() is None:
            samples.append((lines[-1]["step"], _resident_bytes(process.pid), _files(workdir)))
        return process.poll() is not None

    wait_for(sample, seconds=280, every=0.5)
    output = (tmp_path / "output").read_text()
    assert process.returncode == 0, output[-2000:]
    early, late = (
        [x for x in samples if first <= x[0] < last]
        for first, last in ((warm, 2 * warm), (steps - warm, steps))
    )
    memory = [max(x[1] for x in part) for part in (early, late)]
    files = [max(x[2] for x in part) for part in (early, late)]
    print(f"memory {memory[0] / 2**20:.1f} -> {memory[1] / 2**20:.1f} MiB, files {files}")
    assert memory[1] < 1.05 * memory[0]
    assert files[1] <= files[0] + 20  # those of a save that is being written
    # Of the whole run, the step is compiled once; after the first hundred steps, nothing is.
    assert len(re.findall(r"Finished XLA compilation of jit\(step\)", output)) == 1
    middle = output[output.index("step  200/2000") : output.index("step 2000/2000")]
    assert "XLA compilation" not in middle
