"""generate.py and the cache command as a user runs them."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import generate
from asa_jax.data.tokenizer import ByteTokenizer
from asa_jax.decoding.conversation import Conversation
from asa_jax.decoding.generate import Generator
from asa_jax.decoding.options import Options
from asa_jax.decoding.prompts import Prompt, check_prompts, read_prompts
from asa_jax.decoding.settings import Sampling
from asa_jax.errors import ConfigError, DataError
from asa_jax.flags import PROJECT
from asa_jax.training.checkpoint import restore_params

Command = Callable[..., subprocess.Popen[bytes]]
REQUEST: dict[str, Any] = {"max_tokens": 24, "sampling": Sampling(0.9, top_p=0.9), "seed": 5}


@pytest.fixture(scope="module")
def start_generate(tmp_path_factory) -> Command:
    """Starts generate.py."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def start(*arguments: str | bytes) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(
            [sys.executable, PROJECT / "generate.py", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        )  # fmt: skip

    return start


@pytest.fixture
def options(workdir) -> Options:
    """Those of a chat with the run, and settings as in REQUEST."""
    unset = {name: None for name in Options._fields}
    given = {"workdir": workdir, "tokenizer": ByteTokenizer(), "stop": (), "chunk_tokens": 64}
    return Options(**{**unset, **given, **REQUEST})


def _check_refusal(process: subprocess.Popen[bytes], code: int, message: str) -> None:
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (code, b"")
    assert errors.decode().startswith("error: ")
    assert message in errors.decode()
    assert errors.count(b"\n") == 1


def test_prints_what_a_generator_gives(start_generate, workdir, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("It is a truth\n")
    process = start_generate(
        f"--workdir={workdir}", f"--prompt_file={prompt}", "--max_tokens=30", "--seed=3",
        "--temperature=0.7", "--top_p=0.9", "--top_k=40", "--step=1",
    )  # fmt: skip
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    assert errors.decode() == f"{workdir}, step 1\nattention: xla on cpu\n"
    config, params, _ = restore_params(workdir, step=1)
    (want,) = Generator(config, params, ByteTokenizer()).generate(
        ["It is a truth\n"], max_tokens=30, sampling=Sampling(0.7, top_k=40, top_p=0.9), seed=3
    )
    assert output.decode() == want + "\n"


def test_closed_pipe_is_no_error_to_tell(start_generate, workdir):
    process = start_generate(f"--workdir={workdir}", "--prompt=It", "--max_tokens=5000")
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
        ([], "--prompt: give one of --prompt, --prompt_file, --prompts_file, --chat"),
        (["--prompt=", "--chat"], "--prompt: give one of --prompt, --prompt_file"),
        ([b"--prompt=a\xff"], "--prompt: character 1 is not UTF-8"),
        (["--prompt=a", "--temperature=-1"], "temperature = -1.0: must be 0 (greedy)"),
        (["--prompt=a", "--top_p=1.5"], "top_p = 1.5: must be from 1e-30 to 1"),
        (["--prompt=a", "--top_k=-1"], "top_k = -1: must be at least 0"),
        (["--chat", "--min_p=2"], "min_p = 2.0: must be from 0 to 1"),
        (["--chat", "--stop="], "stop = '': must be at least a character"),
        (["--prompts_file=a", "--log_probabilities=21"], "--log_probabilities=21"),
        (["--chat", "--log_probabilities=0"], "--log_probabilities: goes with --prompts_file"),
        (["--prompt=a", "--batch_size=8"], "--batch_size: goes with --prompts_file"),
        (["--prompt=a", "--system_prompt=b"], "--system_prompt: goes with --chat"),
        (["--chat", "--system_prompt=b"], "has no chat template, which would place it"),
        (["--chat", "--chunk_tokens=24"], "chunk_tokens = 24: must be a positive multiple of 16"),
        (["--chat", "--save_cache=/none/c"], "--save_cache=/none/c: must name a file in a folder"),
        (["--chat", "--save_cache=/dev/null"], "--save_cache=/dev/null: must name a file in a"),
        (
            ["--prompts_file=a", "--load_cache=b"],
            "--load_cache: holds one text, --prompts_file",
        ),
        (["--chat", "--decoder=async_tls"], "--chat: goes with --decoder=full alone"),
        (["--prompt=a", "--show_engine"], "--show_engine: goes with --decoder=async_tls"),
        (["--prompt=a", "--decoder=quest"], "model.layer_kinds: sliding: sparse decoding takes"),
        (["--prompt=a", "--config.async_tls.num_block=3"], "did you mean 'num_blocks'?"),
        (["--prompt=a", "--config.async_tls.num_blocks=3"], "goes with another --decoder than"),
        (["--prompt=a", "--max_tokens=0"], "max_tokens = 0: must be from 1 to 1048575"),
        (["--prompt=a", "--max_token=9"], "Did you mean: max_tokens"),
        (["--prompt=a", "--workdir="], "--workdir: missing"),
    ],
)
def test_wrong_flags(start_generate, workdir, arguments, message):
    _check_refusal(start_generate(f"--workdir={workdir}", *arguments), 2, message)


def test_run_or_file_that_cannot_be_read(start_generate, workdir, tmp_path):
    broken = tmp_path / "prompt.txt"
    broken.write_bytes(b"good\xc3")
    run = f"--workdir={workdir}"
    for arguments, message in (
        ((f"--workdir={tmp_path}", "--prompt=a"), "config.json: cannot be read"),
        ((run, f"--prompt_file={broken}"), f"{broken}: byte 4 is not UTF-8"),
        ((run, f"--prompt_file={tmp_path}"), f"{tmp_path}: cannot be read (Is a directory)"),
    ):
        _check_refusal(start_generate(*arguments), 1, message)


def test_chat_goes_on_from_a_saved_cache(options, workdir, tmp_path, monkeypatch, capsys):
    config, params, _ = restore_params(workdir)
    want = Conversation(Generator(config, params, ByteTokenizer()))
    answers = ["".join(want.answer("It is a truth", **{**REQUEST, "max_tokens": 0}))]
    for line in ("universally", "acknowledged"):
        start = "" if want.tokens[-1] == ord("\n") else "\n"
        answers.append("".join(want.answer(f"{start}{line}\n", **REQUEST)))

    cache, again = tmp_path / "cache", tmp_path / "again"
    generate.main(options._replace(prompt="It is a truth", save_cache=cache, max_tokens=0))
    monkeypatch.setattr("sys.stdin", io.StringIO("universally\nacknowledged\n"))
    generate.main(options._replace(load_cache=cache, save_cache=again))
    output, errors = capsys.readouterr()
    assert output == "".join(f"{answer}\n" for answer in answers)
    assert errors.endswith("\nno chat template: lines go to the model as they are\n")
    loaded = Conversation.load(Generator(config, params, ByteTokenizer()), again)
    assert loaded.tokens == want.tokens


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter in a C locale
def test_line_of_a_chat_that_is_no_text(options, monkeypatch, errors):
    stdin = io.TextIOWrapper(io.BytesIO(b"ab\xff\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(DataError, match="stdin: a line is not UTF-8"):
        generate.main(options)


def test_interrupt_ends_an_answer_and_not_the_chat(options, monkeypatch, capsys):
    class Interrupted(Conversation):
        turns = 0

        def answer(self, text, **request):
            yield f"{text}?"
            self.turns += 1
            if self.turns == 1:
                raise KeyboardInterrupt
            yield "!"

    monkeypatch.setattr(generate, "Conversation", Interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    generate.main(options)
    assert capsys.readouterr().out == "a\n?\nb\n?!\n"


def test_prompts_of_a_file_in_batches(options, workdir, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "It is"}\n\n{"prompt": "", "seed": 7}\n{"prompt": "a truth"}\n')
    prompts = read_prompts(path)
    assert prompts == [(1, "It is", None), (3, "", 7), (4, "a truth", None)]
    generate.main(options._replace(prompts=prompts, batch_size=2, num_alternatives=3))
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["line"] for result in results] == [1, 3, 4]

    config, params, _ = restore_params(workdir)
    generator = Generator(config, params, ByteTokenizer())
    want = generator.complete(
        ["a truth", "It is"], **{**REQUEST, "seed": [REQUEST["seed"] + 3, 7]}, num_alternatives=3
    )[0]
    assert results[2]["text"] == want.text
    assert results[2]["finish_reason"] == want.finish_reason
    assert results[2]["tokens"] == want.tokens
    assert results[2]["num_tokens"] == len(want.tokens) > 0
    np.testing.assert_allclose(results[2]["log_probabilities"], want.log_probabilities, atol=1e-5)
    for token, log, likely in zip(
        want.tokens, want.log_probabilities, results[2]["alternatives"], strict=True
    ):
        assert [value for _, value in likely] == sorted((v for _, v in likely), reverse=True)
        assert log <= likely[0][1] + 1e-5
        assert len(likely) == 3
        assert dict(likely).get(token, log) == pytest.approx(log, abs=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "prompts.jsonl: has no line with a prompt"),
        (b'{"prompt": "a"}\n{"prompt"', "prompts.jsonl:2: broken JSON"),
        (b'["a"]', "prompts.jsonl:1: must be an object with a text"),
        (b'{"prompt": 3}', "prompts.jsonl:1: must be an object with a text"),
        (b'{"prompt": "a", "sed": 3}', "prompts.jsonl:1: 'sed' is not known"),
        (b'{"prompt": "a", "seed": -1}', "prompts.jsonl:1: seed = -1: must be an int from 0"),
        (b'{"prompt": "a", "seed": true}', "prompts.jsonl:1: seed = True: must be an int from 0"),
        (b'{"prompt": "\\ud800"}', "prompts.jsonl:1: character 0 of the prompt is no text"),
        (b'{"prompt": "a\xff"}', "prompts.jsonl: byte 13 is not UTF-8"),
    ],
)
def test_files_of_prompts_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        read_prompts(path)


def test_a_prompt_that_is_too_long_is_told_before_the_first_one_is_continued():
    prompts = [Prompt(1, "a", None), Prompt(4, "é" * 2**19, None)]
    message = "a.jsonl:4: prompt of 1048576 tokens and max_tokens = 1: must be at most 1048576"
    with pytest.raises(ConfigError, match=message):
        check_prompts(Path("a.jsonl"), prompts, ByteTokenizer(), 1)


def test_prompt_that_is_too_long(start_generate, workdir, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b"a" * 2**20)
    process = start_generate(f"--workdir={workdir}", f"--prompt_file={prompt}")
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
