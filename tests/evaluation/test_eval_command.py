"""`eval.py`: a run from its directory to its report, and what it refuses."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import eval as eval_command
from asa_jax.config import MeshConfig, config_from_dict, config_to_dict
from asa_jax.data.prepare import parse, prepare
from asa_jax.data.tokenizer import ByteTokenizer
from asa_jax.errors import ConfigError
from asa_jax.evaluation.options import Options
from asa_jax.evaluation.results import Job
from asa_jax.flags import PROJECT
from asa_jax.sharding import make_mesh
from asa_jax.training.checkpoint import make_meta
from asa_jax.training.checkpoint_writer import CheckpointWriter
from asa_jax.training.step import TrainState
from tests.models import random_params

TEXT = "It is a truth, universally acknowledged. " * 60


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, make_config) -> Path:
    """A run over bytes that was saved at step 7, with its token folder."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("train", "validation"):
        (folder / f"{name}.txt").write_text(TEXT)
    inputs = ["--input", str(folder / "train.txt"), "--tokenizer", "bytes"]
    inputs += ["--validation-input", str(folder / "validation.txt")]
    prepare(parse([*inputs, "--output", str(folder / "tokens")]))
    config = make_config(
        lengths=(768,), depths=(0.5,), samples=1, tasks=("perplexity", "single_text", "key_value"),
        position_bucket_tokens=256,
    )  # fmt: skip
    values = config_to_dict(config)
    values["data"]["sources"] = [str(folder / "tokens")]
    (folder / "config.json").write_text(json.dumps(values))
    config = config_from_dict(values)
    params = jax.tree.map(jnp.asarray, random_params(config.model))
    state = TrainState(params, (), jnp.int32(7), jnp.int32(0), jnp.int32(0), jnp.float32(0))
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1, context=1))
    (folder / "checkpoints").mkdir()
    with CheckpointWriter(folder, keep=2) as writer:
        writer.save(state, {}, make_meta(config, mesh, state, {}))
    return folder


def _options(workdir: Path, **changes) -> Options:
    config = config_from_dict(json.loads((workdir / "config.json").read_text()))
    values = {
        "workdir": workdir, "step": None, "evaluation": config.evaluation,
        "tokenizer": ByteTokenizer(), "text": [], "filler": workdir / "train.txt",
        "multiple_choice": [], "key_value": [], "lm_eval": [], "limit": None,
        "output": workdir / "evaluation",
    }  # fmt: skip
    return Options(**values | changes)


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch) -> None:
    """Leaves the user's cache and the settings of jax alone."""
    monkeypatch.setattr(eval_command, "use_compilation_cache", lambda: None)


def test_a_run_is_evaluated_and_reported(workdir, capsys):
    eval_command.main(_options(workdir))
    content = json.loads((workdir / "evaluation" / "results.json").read_text())
    assert content["step"] == 7
    assert content["config"]["evaluation"]["lengths"] == [768]
    (perplexity,) = content["perplexity"]
    assert perplexity["tokens"] == perplexity["text_bytes"] + 1 == len(TEXT)
    assert [answer["task"] for answer in content["answers"]] == ["single_text", "key_value"]
    out = capsys.readouterr().out
    assert f"{perplexity['bits_per_byte']:.3f}" in out
    assert str(workdir / "evaluation" / "depths.png") in out


def test_what_was_measured_before_an_interruption_is_reported(workdir, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_command, "generated_jobs", lambda *_: [Job("x", 1, interrupted)])
    with pytest.raises(KeyboardInterrupt):
        eval_command.main(_options(workdir, output=tmp_path))
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["perplexity"] and not content["answers"]


def test_nothing_to_measure_is_refused(workdir):
    evaluation = dataclasses.replace(_options(workdir).evaluation, tasks=())
    with pytest.raises(ConfigError, match="--tasks: nothing to measure"):
        eval_command.main(_options(workdir, evaluation=evaluation))


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "--workdir: missing"),
        (["--workdir={run}/none"], 1, "none/config.json: cannot be read"),
        (["--workdir={run}", "--tasks=perplexity,singl"], 2, "tasks = 'singl': must be one of"),
        (["--workdir={run}", "--lengths=1,x"], 2, "--lengths=1,x: must be numbers"),
        (["--workdir={run}", "--lengths=2000000"], 2, "lengths = 2000000: must be from 2 to"),
        (["--workdir={run}", "--depths=1.5"], 2, "depths = (1.5,): must be between 0"),
        (["--workdir={run}", "--position_bucket_tokens=0"], 2, "position_bucket_tokens = 0: must"),
        (["--workdir={run}", "--text={run}/none.txt"], 2, "none.txt: no such file"),
        (["--workdir={run}", "--task=perplexity"], 2, "Unknown command line flag 'task'"),
    ],
)
def test_a_wrong_command_line_is_one_line(workdir, flags, code, message):
    command = [sys.executable, "eval.py", *(flag.format(run=workdir) for flag in flags)]
    start = time.monotonic()
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert result.returncode == code
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not result.stdout
    # Jax alone takes longer to import; generous, for a busy machine.
    assert time.monotonic() - start < 10
