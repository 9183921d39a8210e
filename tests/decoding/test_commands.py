"""generate.py and the cache command as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from asa_jax.data.tokenizer import ByteTokenizer
from asa_jax.decoding.generate import generate_text
from asa_jax.flags import PROJECT
from asa_jax.training.checkpoint import restore_params

Command = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def generate(tmp_path_factory) -> Command:
    """Starts generate.py."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def start(*arguments: str | bytes) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(
            [sys.executable, PROJECT / "generate.py", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        )  # fmt: skip

    return start


def _check_refusal(process: subprocess.Popen[bytes], code: int, message: str) -> None:
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (code, b"")
    assert errors.decode().startswith("error: ")
    assert message in errors.decode()
    assert errors.count(b"\n") == 1


def test_prints_what_generate_text_gives(generate, workdir, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("It is a truth\n")
    process = generate(
        f"--workdir={workdir}", f"--prompt_file={prompt}", "--max_tokens=30", "--seed=3",
        "--temperature=0.7", "--top_p=0.9", "--top_k=40", "--step=1",
    )  # fmt: skip
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    assert errors.decode() == f"{workdir}, step 1\nattention: xla on cpu\n"
    config, params, _ = restore_params(workdir, step=1)
    want = generate_text(
        config, params, ByteTokenizer(), "It is a truth\n", max_tokens=30, seed=3,
        temperature=0.7, top_p=0.9, top_k=40,
    )  # fmt: skip
    assert output.decode() == want + "\n"


def test_closed_pipe_is_no_error_to_tell(generate, workdir):
    process = generate(f"--workdir={workdir}", "--prompt=It", "--max_tokens=5000")
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=120) == 1
    assert errors == f"{workdir}, step 2\nattention: xla on cpu\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt: give either --prompt or --prompt_file"),
        (["--prompt=a", "--prompt_file=b"], "--prompt: give either --prompt or --prompt_file"),
        ([b"--prompt=a\xff"], "--prompt: character 1 is not UTF-8"),
        (["--prompt=a", "--temperature=-1"], "temperature = -1.0: must be at least 0"),
        (["--prompt=a", "--top_p=1.5"], "top_p = 1.5: must be above 0 and at most 1"),
        (["--prompt=a", "--top_k=-1"], "top_k = -1: must be at least 0"),
        (["--prompt=a", "--max_tokens=0"], "max_tokens = 0: must be from 1 to 1048575"),
        (["--prompt=a", "--max_token=9"], "Did you mean: max_tokens"),
        (["--prompt=a", "--workdir="], "--workdir: missing"),
    ],
)
def test_wrong_flags(generate, workdir, arguments, message):
    _check_refusal(generate(f"--workdir={workdir}", *arguments), 2, message)


def test_run_or_file_that_cannot_be_read(generate, workdir, tmp_path):
    broken = tmp_path / "prompt.txt"
    broken.write_bytes(b"good\xc3")
    run = f"--workdir={workdir}"
    for arguments, message in (
        ((f"--workdir={tmp_path}", "--prompt=a"), "config.json: cannot be read"),
        ((run, f"--prompt_file={broken}"), f"{broken}: byte 4 is not UTF-8"),
        ((run, f"--prompt_file={tmp_path}"), f"{tmp_path}: cannot be read (Is a directory)"),
    ):
        _check_refusal(generate(*arguments), 1, message)


def test_prompt_that_is_too_long(generate, workdir, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b"a" * 2**20)
    process = generate(f"--workdir={workdir}", f"--prompt_file={prompt}")
    _check_refusal(process, 2, "prompt of 1048576 tokens and max_tokens = 200: must be at most")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths=4096,x"], "--lengths=4096,x: must be whole numbers with commas between"),
        (["--lengths=0"], "--lengths=0: must be from 1 to"),
        ([f"--json={Path(__file__).parent}"], "must name a file in a folder that exists"),
        (["--config=configs/none.py"], "no such file"),
    ],
)
def test_cache_command_refuses(arguments, message):
    process = subprocess.Popen(
        [sys.executable, "-m", "asa_jax.decoding.cache", *arguments],
        cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    _check_refusal(process, 2, message)
