"""The comparison as a whole: every stage of the smoke grid, killed on the way, and its report."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asa_jax.data import prepare
from asa_jax.flags import PROJECT
from experiments import report
from experiments.measured import load_comparison

GRID = """
import dataclasses, runpy
smoke = runpy.run_path({smoke!r})["GRID"]
GRID = dataclasses.replace(smoke, sources=({tokens!r},))
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """The smoke grid, with tokens of its own."""
    texts, tokens = PROJECT / "texts", tmp_path / "tokens"
    arguments = [
        "--input",
        str(texts / "train" / "*"),
        "--tokenizer",
        str(texts / "tokenizer.json"),
    ]
    arguments += ["--validation-input", str(texts / "validation" / "*"), "--output", str(tokens)]
    prepare.prepare(prepare.parse(arguments))
    path = tmp_path / "grid.py"
    smoke = PROJECT / "experiments" / "grids" / "smoke.py"
    path.write_text(GRID.format(smoke=str(smoke), tokens=str(tokens)))
    return path


def compare(*flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "experiments.compare", *flags]
    # Most of the time is compilation.
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=PROJECT, env=environment
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_stage_through_a_kill(grid, tmp_path):
    flags = [f"--grid={grid}", f"--output={tmp_path / 'out'}", "--gpu=0,1"]
    results = tmp_path / "out" / "results"
    process = compare(*flags)
    while len(list(results.glob("*_s0/sweep_*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    said, _ = compare(*flags).communicate()
    assert "failed" not in said, said
    begun = re.search(r"2 of (\d+) stages are finished", said)
    assert begun, said
    said, _ = compare(*flags).communicate()
    assert said.strip().endswith(f"{begun[1]} of {begun[1]} stages are finished")

    page = tmp_path / "page.md"
    report.main([str(tmp_path / "out"), f"--output={page}"])
    text = page.read_text()
    assert "not measured" not in text and "### Missing" not in text
    asa, full = (load_comparison(tmp_path / "out").of(model)[0] for model in ("asa", "full"))
    assert asa.stages["train"]["tokens"] == full.stages["train"]["tokens"] == 4 * 2 * 256
    # Two sweeps chose the rate; only the parameters that may be needed again are kept.
    assert asa.stages["train"]["config"]["optimizer"]["learning_rate"] in (5e-3, 1e-2)
    kept = {
        path.parent.name for path in (tmp_path / "out" / "runs" / "asa_s0").glob("*/checkpoints")
    }
    assert kept == {"train"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid=no.py"], "--grid="),
        (["--grid=experiments/grids/smoke.py", "--arms=nsa"], "--arms: 'nsa' must be one of full"),
        (["--grid=experiments/grids/smoke.py", "--seeds=1"], "--seeds: '1' must be one of 0"),
        (["--grid=experiments/grids/smoke.py", "--time_limit_s=0"], "--time_limit_s=0: must be"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path):
    command = [sys.executable, "-m", "experiments.compare", *flags, f"--output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
