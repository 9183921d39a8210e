"""The files of clusters/ start the command of a single machine."""

import re
import subprocess

import pytest
import yaml

from asa_jax.flags import PROJECT

FOLDER = PROJECT / "clusters"
COMMAND = ["train.py", "--config=configs/asa_1b.py", "--workdir=/shared/runs/asa_1b"]


def _command(script: str) -> list[str]:
    """Arguments after the interpreter, with continued lines joined."""
    line = next(x for x in script.replace("\\\n", " ").splitlines() if "train.py" in x)
    return line[line.index("train.py") :].split()


def test_slurm():
    script = (FOLDER / "slurm.sh").read_text()
    assert _command(script) == COMMAND
    assert subprocess.run(["bash", "-n", FOLDER / "slurm.sh"]).returncode == 0
    # One task a GPU, as jax's detection of Slurm assumes.
    tasks, gpus = (re.search(rf"{x}-per-node=(\d+)", script)[1] for x in ("ntasks", "gpus"))
    assert tasks == gpus


def test_jobset():
    jobset, *_, binding = yaml.safe_load_all((FOLDER / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    assert pod["containers"][0]["command"] == ["python", *COMMAND]
    assert spec["completions"] == spec["parallelism"]
    assert pod["serviceAccountName"] == binding["subjects"][0]["name"]


@pytest.mark.parametrize("rank", [0, 3])
def test_skypilot(rank):
    """The flags that the launcher adds are those of one of its nodes."""
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    script = task["run"].replace(".venv/bin/python", "printf '%s\\n'")
    variables = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "4",
        "SKYPILOT_NODE_RANK": str(rank), "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [
        *COMMAND, "--coordinator_address=10.0.0.1:55527", "--num_processes=4",
        f"--process_id={rank}",
    ]  # fmt: skip
