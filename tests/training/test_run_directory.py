"""The lock of a run and what may change when it goes on; no device is needed."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import tokenizers

from asa_jax.config import config_to_dict
from asa_jax.data.prepare import parse, prepare
from asa_jax.data.shards import open_token_folder
from asa_jax.errors import CheckpointError, ConfigError
from asa_jax.flags import PROJECT
from asa_jax.trained_run import load_run_tokenizer
from asa_jax.training.run_directory import (
    claim_data,
    config_changes,
    copy_tokenizer,
    forget_run,
    note_run,
    open_run,
    open_sources,
    run_notes,
)


def _open(workdir, config, allow_changes=False):
    return open_run(workdir, config, allow_changes=allow_changes)


def test_writes_the_configuration(tmp_path, make_config):
    with _open(tmp_path / "a" / "b", make_config()):
        written = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert config_changes(written, config_to_dict(make_config())) == []


def test_a_run_knows_when_its_first_process_began(tmp_path, make_config, monkeypatch):
    for now in (1000.0, 5000.0):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        _open(tmp_path, make_config()).close()
        note_run(tmp_path, device=f"at {now}")
    assert run_notes(tmp_path) == {"began": 1000.0, "device": "at 5000.0"}


def test_a_run_that_could_not_start_leaves_nothing(tmp_path, make_config):
    """Unless something else has come to lie there."""
    workdir = tmp_path / "run"
    _open(workdir, make_config()).close()
    (workdir / "notes.txt").touch()
    forget_run(workdir)
    assert (workdir / "config.json").exists()
    (workdir / "notes.txt").unlink()
    forget_run(workdir)
    assert list(tmp_path.iterdir()) == []


def _hold(workdir, config, ready):
    with _open(workdir, config):
        ready.set()
        time.sleep(60)


def test_a_second_trainer_is_refused_and_a_dead_one_leaves_no_lock(tmp_path, make_config):
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    holder = spawn.Process(target=_hold, args=(tmp_path, make_config(), ready))
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(CheckpointError, match=rf"train\.lock: .* \(pid {holder.pid} on "):
            _open(tmp_path, make_config())
    finally:
        holder.kill()
        holder.join()
    with _open(tmp_path, make_config()):
        assert f"pid {os.getpid()} on " in (tmp_path / "train.lock").read_text()


@pytest.fixture
def begun(tmp_path, make_config):
    """A run directory that has a checkpoint."""
    _open(tmp_path, make_config()).close()
    (tmp_path / "checkpoints" / "10").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.mlp_size", 48),
        ("optimizer.learning_rate", 0.5),
        ("optimizer.accumulation_steps", 2),
        ("training.seed", 1),
        ("data.seed", 1),
        ("data.batch_size", 16),
    ],
)
def test_a_changed_field_is_refused_by_name(begun, make_config, field, value):
    changed = make_config(**{field: value})
    with pytest.raises(ConfigError, match=rf"^config\.{field}: was .*, is {value}"):
        _open(begun, changed)
    _open(begun, changed, allow_changes=True).close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("training.steps", 40),
        ("training.checkpoint_every_steps", 3),
        ("mesh.fsdp", 2),
        ("data.sources", ("moved",)),
        ("evaluation.seed", 1),
        ("model.remat", "full"),
        ("model.attention_implementation", "xla"),
    ],
)
def test_a_field_that_does_not_change_the_next_step_may_change(begun, make_config, field, value):
    _open(begun, make_config(**{field: value})).close()


def test_a_run_cannot_be_made_shorter_than_it_is(begun, make_config):
    before = (begun / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"config\.training\.steps = 9: .* of step 10; give"):
        _open(begun, make_config(**{"training.steps": 9}), allow_changes=True)
    assert (begun / "config.json").read_bytes() == before
    _open(begun, make_config(**{"training.steps": 10})).close()


def test_a_run_without_checkpoints_starts_with_any_configuration(tmp_path, make_config):
    _open(tmp_path, make_config()).close()
    _open(tmp_path, make_config(**{"model.mlp_size": 48})).close()


def test_a_broken_config_json_leaves_the_decision_to_the_checkpoint(begun, make_config):
    (begun / "config.json").write_text("{")
    _open(begun, make_config(**{"model.mlp_size": 48})).close()


def test_sources_are_checked(token_folder, make_config):
    name = str(token_folder)
    assert len(open_sources(make_config(**{"data.sources": (name,)}))) == 1
    small = make_config(**{"data.sources": (name,), "model.vocab_size": 200})
    with pytest.raises(ConfigError, match=r"config\.model\.vocab_size"):
        open_sources(small)


def test_a_refusal_needs_no_jax(begun):
    """The imports of train.py up to its refusals."""
    code = "import asa_jax.training.run_directory, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_other_data_is_refused_before_jax_is_imported(begun):
    was = {"sources": ["a"], "seed": 0}
    claim_data(begun, was, allow_changes=False)
    with pytest.raises(ConfigError, match=r"config\.data: sources was \['a'\], is \['b'\]"):
        claim_data(begun, was | {"sources": ["b"]}, allow_changes=False)
    claim_data(begun, was, allow_changes=False)
    claim_data(begun, was | {"sources": ["b"]}, allow_changes=True)


def test_data_may_change_before_the_first_checkpoint(tmp_path, make_config):
    _open(tmp_path, make_config()).close()
    claim_data(tmp_path, {"seed": 0}, allow_changes=False)
    claim_data(tmp_path, {"seed": 1}, allow_changes=False)
    assert json.loads((tmp_path / "data.json").read_text()) == {"seed": 1}


@pytest.fixture(scope="module")
def unusual_source(tmp_path_factory):
    """A token folder whose documents end with a token of an unusual name."""
    folder = tmp_path_factory.mktemp("unusual")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text("a b")
    arguments = ["--input", str(folder / "text.txt"), "--tokenizer", str(folder / "tokenizer.json")]
    more = ["--end-of-document", "<stop>", "--output", str(folder / "tokens")]
    prepare(parse([*arguments, "--validation-fraction", "0", *more]))
    return open_token_folder(folder / "tokens")


def test_a_run_keeps_the_name_of_the_end_of_document(unusual_source, tmp_path):
    copy_tokenizer(unusual_source, tmp_path)
    tokenizer = load_run_tokenizer(tmp_path)
    assert tokenizer.end_of_document == "<stop>"
    assert tokenizer.fingerprint == unusual_source.tokenizer_fingerprint


def test_an_error_of_copying_the_tokenizer_names_the_copy(unusual_source, tmp_path):
    (tmp_path / ".tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/tokenizer.json: cannot be written"):
        copy_tokenizer(unusual_source, tmp_path)


def test_a_file_system_without_locks_is_named(tmp_path, make_config, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(CheckpointError, match=r"train\.lock: cannot be locked .* offer flock"):
        _open(tmp_path, make_config())
