"""train.py as a user runs it: finish, resume, signals, damage, refusals."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import chex
import pytest

from asa_jax.errors import UserError
from asa_jax.flags import PROJECT
from asa_jax.launch import Launch
from asa_jax.training.checkpoint import restore_params
from asa_jax.training.metrics import read_metrics
from asa_jax.training.run_directory import Run, open_run
from tests.training.commands import STEPS, final_params, losses, wait_for_step
from train import start as first_state


def test_a_run_says_what_it_does_and_where_everything_is(finished):
    workdir, done = finished
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"starts at step 0 of {STEPS}:")
    assert any(line.startswith("step 60/60  loss ") and "bits/byte" in line for line in lines)
    assert not done.stderr
    assert lines[lines.index("a sample:") + 1].startswith("The ")
    for name in ("checkpoints", "metrics.jsonl", "tensorboard", "loss.png", "config.json"):
        assert (workdir / name).exists()
    assert f"python eval.py --workdir={workdir}" in done.stdout
    steps = [line["step"] for line in read_metrics(workdir) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    evaluated = [line for line in read_metrics(workdir) if "validation_loss" in line]
    assert [line["step"] for line in evaluated] == [40, STEPS]
    assert evaluated[1]["validation_loss"] < evaluated[0]["validation_loss"]


def test_a_finished_run_says_so(finished, train):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    done = train(workdir)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"finished: {STEPS} steps")
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(finished, train, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    done = train(tmp_path / "run", "--config.training.steps=61")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("resumes after step 60 of 61")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(finished, start, train, tmp_path, number):
    workdir = tmp_path / "run"
    process = start(workdir, "--config.training.checkpoint_every_steps=1000")
    wait_for_step(workdir, 7)
    process.send_signal(number)
    time.sleep(random.Random(number).random() / 10)
    process.send_signal(number)  # during the save, or close to it
    assert process.wait(60) == 128 + number
    output = (tmp_path / "output").read_text()
    assert "stopped after step" in output and "Traceback" not in output
    done = train(workdir)
    assert done.returncode == 0, done.stderr
    assert losses(workdir) == losses(finished[0])
    chex.assert_trees_all_equal(final_params(workdir), final_params(finished[0]))


def test_a_damaged_newest_step_is_passed_over(finished, train, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    file = workdir / "checkpoints" / str(STEPS) / "params" / "manifest.ocdbt"
    file.write_bytes(file.read_bytes()[:-1])
    done = train(workdir)
    assert done.returncode == 0
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("WARNING: ")
    assert "60: passed over: params/manifest.ocdbt is not as it was written" in warning
    assert done.stdout.startswith("resumes after step 40 of 60")
    assert losses(workdir) == losses(finished[0])
    chex.assert_trees_all_equal(final_params(workdir), final_params(finished[0]))


def test_damaged_checkpoints_are_never_a_silent_new_start(finished, train, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    for digest in workdir.glob("checkpoints/*/digest.json"):
        digest.unlink()
    done = train(workdir)
    assert done.returncode == 1
    assert "checkpoints is usable (60: digest.json is missing)" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_run_that_is_not_finite_stops_and_saves_nothing_of_it(train, tmp_path):
    done = train(
        tmp_path / "run", "--config.optimizer.learning_rate=1e30",
        "--config.training.max_skipped_steps=3", "--config.training.checkpoint_every_steps=1",
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "3 steps in a row skipped (config.training.max_skipped_steps)" in line
    chex.assert_tree_all_finite(restore_params(tmp_path / "run")[1])


def test_a_save_that_fails_ends_the_run_in_one_line(command, environment, tmp_path, finished):
    """A limit on file sizes in the place of a full disk; `finished` has compiled everything."""
    limited = ["bash", "-c", 'ulimit -f 30; exec "$@"', "-", *command]
    done = subprocess.run(
        [*limited, f"--workdir={tmp_path / 'run'}"],
        cwd=PROJECT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{tmp_path}/run/checkpoints: a checkpoint of " in line
    assert "bytes could not be written: File too large" in line


def _refusal(train, workdir, *more):
    """Runs and returns the single line of the refusal, its code and the processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = train(workdir, *more)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (line,) = done.stderr.splitlines()
    assert not done.stdout
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 2
    return line, done.returncode


def test_refuses_what_it_can_before_importing_jax(finished, train, tmp_path, make_config):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    line, code = _refusal(train, workdir, "--config.data.seed=1")
    assert (code, line.startswith("error: config.data.seed: was 0, is 1")) == (2, True)
    # Given twice, a tuple has both elements.
    flags = ("--config.data.sources=nowhere", "--config.data.weights=(1.0,1.0)")
    line, code = _refusal(train, workdir, *flags)
    assert (code, line.startswith("error: nowhere: no manifest.json")) == (1, True)
    line, code = _refusal(train, workdir, "--config.model.vocab_size=100")
    assert (code, "config.model.vocab_size" in line) == (2, True)
    line, code = _refusal(train, PROJECT / "train.py" / "run")
    assert (code, "Not a directory" in line) == (1, True)
    with open_run(workdir, make_config(**{"training.steps": STEPS}), allow_changes=True):
        line, code = _refusal(train, workdir)
    assert (code, f"a trainer works here already (pid {os.getpid()}" in line) == (1, True)


def test_a_reader_that_goes_away_does_not_end_the_run(command, environment, tmp_path, finished):
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | head -n 1', "-", *command,
         f"--workdir={tmp_path / 'run'}"],
        cwd=PROJECT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert losses(tmp_path / "run") == losses(finished[0])


def test_config_json_is_what_was_trained_with(finished):
    written = json.loads((finished[0] / "config.json").read_text())
    assert written["training"]["steps"] == STEPS


def test_a_run_starts_from_the_parameters_of_another(finished, command, environment, tmp_path):
    """Sliding layers go on as a sliding and a local one, near the loss that they had."""
    workdir, started = finished[0], tmp_path / "started"
    kinds = "--config.model.layer_kinds"
    arguments = [flag for flag in command if not flag.startswith(kinds)] + [
        f"{kinds}=('sliding', 'local')", f"--config.init_from={workdir}",
        f"--workdir={started}", "--config.training.steps=4",
    ]  # fmt: skip

    done = subprocess.run(arguments, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"parameters of {workdir}\n  layer 1 sliding -> local: relative error" in done.stdout
    before, now = (
        [line["loss"] for line in read_metrics(path) if "loss" in line]
        for path in (workdir, started)
    )
    assert now[0] < (before[0] + before[-1]) / 2


def test_a_model_that_reads_other_tokens_is_no_start(train, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(PROJECT / "texts" / "tokenizer.json", tmp_path)
    for start, reason in ((tmp_path, "its tokenizer is not that of"), ("no", "has no config.json")):
        done = train(tmp_path / "run", f"--config.init_from={start}")
        assert done.returncode == 2
        assert f"config.init_from = '{start}': {reason}" in done.stderr


def test_parameters_that_cannot_be_read_leave_no_run(tmp_path, make_config):
    """Found once jax is there, when the run directory has been made."""
    folder, workdir = tmp_path / "model", tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    config = make_config(**{"init_from": str(folder)})
    with open_run(workdir, config, allow_changes=False) as lock:
        run = Run(config, workdir, [], False, Launch(), lock)
        with pytest.raises(UserError, match="model"):
            first_state(run, SimpleNamespace(mesh=None), SimpleNamespace(peek=None))
    assert not workdir.exists()
    assert not (tmp_path / "run").exists()
