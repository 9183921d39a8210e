"""Chats that go on turn by turn: only new tokens are read, and the text is the template's."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

import generate
from asa_jax.data.tokenizer import JsonTokenizer
from asa_jax.decoding.chat import Chat
from asa_jax.decoding.conversation import Conversation
from asa_jax.decoding.generate import Generator
from asa_jax.decoding.options import Options
from asa_jax.decoding.settings import Sampling
from asa_jax.errors import ConfigError, ImportedModelError
from asa_jax.flags import PROJECT
from asa_jax.interop.chat import (
    ChatTemplate,
    encode_messages,
    encode_reply,
    find_chat_template,
)
from asa_jax.interop.huggingface import load_model
from asa_jax.trained_run import read_run_config
from tests.interop.reference_cases import CASES, TOKENIZER, write_model

# w40 and w41 open and close a message, w1 to w3 are roles.
TEMPLATE = """{% set roles = {'system': 'w1', 'user': 'w2', 'assistant': 'w3'} %}
{% for m in messages %}w40 {{ roles[m.role] }} {{ m.content | trim }} w41 {% endfor %}
{% if add_generation_prompt %}w40 w3 {% endif %}"""
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role }}
{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GREEDY: dict[str, Any] = {"max_tokens": 6, "sampling": Sampling(temperature=0)}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def chatml() -> tuple[ChatTemplate, JsonTokenizer]:
    """A template, and a byte-level BPE with its special tokens."""
    tokenizer = tokenizers.Tokenizer.from_file(str(PROJECT / "texts" / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    template = ChatTemplate(Path("chat_template.jinja"), CHATML, {})
    return template, JsonTokenizer(tokenizer.to_str(), "tokenizer.json")


def test_turns_make_the_text_of_the_whole_conversation(chatml):
    template, tokenizer = chatml
    messages = [_message("system", "Be brief."), _message("user", "A rose?")]
    tokens = encode_messages(template, tokenizer, messages)
    for answer, line in (("Is a rose.", "And\ta <b>"), ("<b>", " daisy? ")):
        messages += [_message("assistant", answer), _message("user", line)]
        tokens += tokenizer.encode(answer) + encode_reply(template, tokenizer, messages)
        assert tokens == encode_messages(template, tokenizer, messages)


def test_what_was_said_before_may_spell_special_tokens(chatml):
    template, tokenizer = chatml
    said = [_message("assistant", "<|im_end|>"), _message("user", "a")]
    assert encode_reply(template, tokenizer, said) == encode_reply(
        template, tokenizer, [_message("assistant", "b"), _message("user", "a")]
    )
    said[1]["content"] = "a<|im_end|>"
    with pytest.raises(ConfigError, match=r"messages\[1\]: spells the special token"):
        encode_reply(template, tokenizer, said)


@pytest.mark.parametrize(("source", "times"), [("{{ messages[1].content }}", 0), (CHATML * 2, 2)])
def test_a_template_must_write_an_answer_once(chatml, source, times):
    template = chatml[0]._replace(source=source)
    said = [_message("assistant", "b"), _message("user", "a")]
    message = f"chat_template.jinja: the chat template: writes an answer {times} times"
    with pytest.raises(ImportedModelError, match=message):
        encode_reply(template, chatml[1], said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder with a chat template."""
    path = write_model(tmp_path_factory.mktemp("model"), CASES["smollm2"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": f"w{i}", "special": True, **flags} for i in (40, 41)]
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER | {"added_tokens": added}))
    settings = {"chat_template": TEMPLATE, "eos_token": "w41"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_generate_command_chats_by_the_template(folder, tmp_path, monkeypatch, capsys):
    _, params, tokenizer = load_model(folder)
    generator = Generator(read_run_config(folder), params, tokenizer)
    tokens, answers = [40, 1, 9, 41], []
    for line in ((5,), (6, 7), (8,)):
        tokens += [40, 2, *line, 41, 40, 3]
        drawn = np.concatenate(list(generator.stream_tokens([tokens], **GREEDY)), axis=1)[0]
        answer = drawn.tolist()[: [*drawn, 41].index(41)]
        answers.append(tokenizer.decode(answer))
        tokens += [*answer, 41]

    options = Options(
        **dict.fromkeys(Options._fields)
        | {"workdir": folder, "tokenizer": tokenizer, "seed": 0, "stop": (), "chunk_tokens": 64}
        | {"template": find_chat_template(folder), **GREEDY}
    )
    first = options._replace(system_prompt="w9", save_cache=tmp_path / "cache")
    monkeypatch.setattr("sys.stdin", io.StringIO("w5\nw6 w7\n"))
    generate.main(first)
    monkeypatch.setattr("sys.stdin", io.StringIO("w8\n"))
    generate.main(options._replace(load_cache=tmp_path / "cache"))
    output, errors = capsys.readouterr()
    assert [line.strip() for line in output.splitlines()] == answers
    assert "no chat template" not in errors
    with pytest.raises(ConfigError, match="--system_prompt: the chat of --load_cache has begun"):
        generate.main(options._replace(load_cache=tmp_path / "cache", system_prompt="w9"))


def test_a_chat_begins_behind_a_plain_text(folder):
    _, params, tokenizer = load_model(folder)
    tokenizer.start_ids = (40,)
    conversation = Conversation(Generator(read_run_config(folder), params, tokenizer))
    list(conversation.answer("w5 w6", max_tokens=0))
    assert conversation.tokens == [40, 5, 6]
    chat = Chat(conversation, tokenizer, find_chat_template(folder))
    list(chat.answer("w7", max_tokens=0))
    # The token that starts a text stands at its start alone.
    assert conversation.tokens == [40, 5, 6, 2, 7, 41, 40, 3]
    assert conversation.messages == [_message("user", "w7"), _message("assistant", "")]
    list(conversation.answer("w8", max_tokens=0))
    assert conversation.messages == []


def test_folders_without_a_template_have_none(tmp_path):
    assert find_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert find_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(ImportedModelError, match="chat_template must be a template"):
        find_chat_template(tmp_path)
