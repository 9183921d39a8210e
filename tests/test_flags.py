"""Wrong command lines: one line that names the field, exit code 2, before jax is imported."""

import resource
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asa_jax.config import Config, config_from_dict, config_to_dict
from asa_jax.errors import ConfigError
from asa_jax.flags import PROJECT
from configs import base

# Imports what every command does before jax, and parses.
PARSE = """
import sys
from asa_jax.flags import exit_on_error, parse_run_flags, run_command
config, workdir = exit_on_error(parse_run_flags)
assert "jax" not in sys.modules
def main():
    print(config.model.num_heads, config.model.layer_kinds, config.data.weights, workdir)
run_command(main)
"""
CONFIG = "--config=configs/base.py"


def _parse(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs PARSE; returns what it did and the seconds of processor time it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", PARSE, *arguments], cwd=PROJECT, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config: missing"),
        (["--config=configs/none.py"], "no such file"),
        (["--config=/etc/passwd"], "must lie in"),
        (["--config=configs/../train.py"], "must lie in"),
        (["--config=configs/tiny.py:none"], "arm 'none'"),
        (["--config=configs/arms.py"], "has no get_config"),
        (["--config=configs/base.py:none"], "get_config() takes 0 positional arguments"),
        ([CONFIG], "--workdir: missing"),
        ([CONFIG, "--workdir=train.py"], "--workdir=train.py: is not a directory"),
        ([CONFIG, "--workdir=w", "stray"], "'stray': unexpected argument"),
        ([CONFIG, "--workdir=w", "--unknown=1"], "Unknown command line flag 'unknown'"),
        (["--config.training.steps=1", CONFIG], "before a value for --config"),
        (["--flagfile=none", CONFIG], "Unable to open flagfile"),
    ],
)
def test_wrong_flags(arguments, message):
    _check_refusal(arguments, message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optimizer.learning_rat", "1", "did you mean 'learning_rate'?"),
        ("optimizer.lrr", "1", "unknown field 'lrr'; known: accumulation_steps"),
        ("model.num_heads.x", "1", "unknown field 'x'"),
        ("optimizer", "{}", "config.optimizer.accumulation_steps: missing"),
        ("optimizer", "3", "not a dict"),
        ("model", "{'a': 1}", "config.model.a: unknown field"),
        ("training.steps", "abc", "config.training.steps=abc"),
        ("training.steps", "1.5", "config.training.steps=1.5"),
        ("training.steps", "-1", "config.training.steps = -1: must be positive"),
        (
            "training.steps",
            "2147483648",
            "config.training.steps = 2147483648: must be an int",
        ),
        ("data.batch_size", "0", "config.data.batch_size = 0: must be positive"),
        ("optimizer.learning_rate", "nan", "config.optimizer.learning_rate = nan: must be finite"),
        ("optimizer.learning_rate", "inf", "config.optimizer.learning_rate = inf: must be finite"),
        ("model.num_heads", "15", "config.model.num_heads = 15: must be a multiple of"),
        ("data.sequence_length", "100", "must be a multiple of model.selection_block_size = 16"),
        ("optimizer.accumulation_steps", "7", "a multiple of optimizer.accumulation_steps = 7"),
        (
            "model.layer_kinds",
            "('full', 3)",
            "layer_kinds[1] = 3: must be of type str",
        ),
        ("model.layer_kinds", "('ful',)", "must be one of full, mla"),
        ("model.tie_embeddings", "3", "config.model.tie_embeddings=3"),
    ],
)
def test_wrong_fields(field, value, message):
    _check_refusal([CONFIG, "--workdir=w", f"--config.{field}={value}"], message)


def _check_refusal(arguments: list[str], message: str) -> None:
    done, seconds = _parse(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not done.stdout
    assert seconds < 2


def test_overrides_and_arms_arrive():
    done, _ = _parse(
        "--config=configs/tiny.py:nsa", "--workdir=w", "--config.model.num_heads=8",
        "--config.data.weights=2",
    )  # fmt: skip
    assert done.stdout.split(maxsplit=1) == ["8", "('nsa', 'nsa', 'nsa', 'nsa') (2.0,) w\n"]
    assert done.returncode == 0


def test_help_is_no_error():
    done, _ = _parse("--help")
    assert done.returncode == 0
    assert not done.stderr


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("return 7", 7, ""),
        (
            "raise DataError('text.txt: byte 3\\n is wrong')",
            1,
            "error: text.txt: byte 3 is wrong\n",
        ),
        ("raise ConfigError('config.x: wrong')", 2, "error: config.x: wrong\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
        ("raise OSError(13, 'Permission denied', 'f')", 1, "error: f: Permission denied\n"),
        ("raise OSError(28, 'No space left on device', 'f')", 1, "error: f: No space left"),
        ("open('no/such/file', 'w')", 1, "error: no/such/file: No such file or directory\n"),
    ],
)
def test_errors_of_a_command(body, code, message):
    done = _run_main(body)
    assert done.returncode == code
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == bool(message)


def test_a_bug_keeps_its_traceback():
    assert "Traceback" in _run_main("raise ValueError('a bug')").stderr


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_is_no_error_message(lines):
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} - | head -n 1"],
        input=_main(f"for i in range({lines}): print(i)"),
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "0\n"
    assert not done.stderr


def _main(body: str) -> str:
    return (
        "from asa_jax.errors import ConfigError, DataError\n"
        "from asa_jax.flags import run_command\n"
        f"def main():\n    {body}\n"
        "run_command(main)\n"
    )


def _run_main(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _main(body)], cwd=PROJECT, capture_output=True, text=True
    )


VALUES = base.get_config().to_dict()
FIELDS = [(section, name) for section, fields in VALUES.items() for name in fields]
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-3, 3), st.text(max_size=3), st.floats()), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(st.sampled_from(FIELDS), ANYTHING)
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(field, value):
    section, name = field
    values = {s: dict(fields) for s, fields in VALUES.items()}
    values[section][name] = value
    try:
        config = config_from_dict(values)
    except ConfigError as error:
        # It names the field, or the one that depends on it.
        assert str(error).startswith("config.") and "\n" not in str(error)
    else:
        assert isinstance(config, Config)
        assert config_from_dict(config_to_dict(config)) == config
