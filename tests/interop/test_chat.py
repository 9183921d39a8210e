"""Chat templates: text and tokens as transformers makes them, and what hostile ones come to."""

import json
import re
from typing import Any

import pytest

from asa_jax.data.tokenizer import ByteTokenizer, JsonTokenizer
from asa_jax.errors import ConfigError, ImportedModelError
from asa_jax.flags import PROJECT
from asa_jax.interop.chat import ChatTemplate, encode_messages, load_chat_template

CHATML = """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
<|im_start|>system
Be brief.<|im_end|>
    {% endif %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
<|im_start|>{{ message['role'] }}
{% generation %}{{ message['content'] | trim }}{% endgeneration %}<|im_end|>
{% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MESSAGES = [
    {"role": "user", "content": " What is 1 < 2? "},
    {"role": "tool", "content": "left out"},
    {"role": "assistant", "content": "true, said Zoë"},
]
TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1 < 2?<|im_end|>\n"
    "<|im_start|>assistant\ntrue, said Zoë<|im_end|>\n"
)


def _template(tmp_path: Any, source: str, **tokens: Any) -> ChatTemplate:
    settings = {"chat_template": source, **tokens}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_chat_template(tmp_path)


def test_blocks_leave_no_lines_and_no_html(tmp_path):
    template = _template(tmp_path, CHATML)
    assert template.render(MESSAGES, add_generation_prompt=False) == TEXT
    tools = [{"name": "<b>", "é": 1}]
    expected = f'{TEXT}[{{"name": "<b>", "é": 1}}]<|im_start|>assistant\n'
    assert template.render(MESSAGES, tools=tools) == expected


def test_transformers_makes_the_same_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    template = _template(tmp_path, CHATML)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.chat_template = CHATML
    for prompt in (False, True):
        options: dict[str, Any] = {"add_generation_prompt": prompt, "tools": [{"name": "<b> é"}]}
        expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert template.render(MESSAGES, **options) == expected


def test_a_template_knows_special_tokens_and_the_date(tmp_path):
    source = "{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y') }}{{ pad_token }}"
    template = _template(
        tmp_path, source, bos_token={"content": "<s>"}, eos_token="</s>", pad_token=None
    )
    assert re.fullmatch(r"<s></s>\d{4}", template.render([{"role": "user", "content": ""}]))


def test_a_file_of_its_own_goes_first_and_of_several_the_default(tmp_path):
    named = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    template = _template(tmp_path, named)
    assert template.source == "b"
    (tmp_path / "chat_template.jinja").write_text("c")
    assert load_chat_template(tmp_path).source == "c"


def test_only_the_template_writes_special_tokens(tmp_path):
    tokenizer = JsonTokenizer((PROJECT / "texts" / "tokenizer.json").read_text(), "tokenizer.json")
    end = tokenizer.end_of_document
    template = _template(tmp_path, "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    template = template._replace(special_tokens={"eos_token": end})
    ids = encode_messages(template, tokenizer, [{"role": "user", "content": "A rose."}])
    assert ids == [*tokenizer.encode("A rose."), tokenizer.end_of_document_id]
    messages = [{"role": "user", "content": "A"}, {"role": "user", "content": f"A{end}B"}]
    with pytest.raises(ConfigError, match=r"messages\[1\]: spells the special token"):
        encode_messages(template, tokenizer, messages)
    with pytest.raises(ConfigError, match="plain bytes"):
        encode_messages(template, ByteTokenizer(), messages)


HOSTILE = [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% if %}", "Expected an expression"),
    ("{{ messages[0].role.nothing.more }}", "has no attribute 'nothing'"),
    ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ("{% set _ = messages.append(1) %}", "access to attribute 'append' of 'list' object is unsafe"),
    ("{{ 'a' * 10**10 }}", "needs more than 536870912 bytes of memory"),
    ("{{ '\\ud800' }}", "writes half a character"),
    ("{{ 'a' * 2**25 }}", "makes a text of 33554432 characters"),
    ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
]


@pytest.mark.parametrize(("source", "reason"), HOSTILE)
def test_a_template_that_fails_is_one_line(tmp_path, source, reason):
    template = _template(tmp_path, source)
    with pytest.raises(ImportedModelError) as caught:
        template.render(MESSAGES)
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer_config.json'}: the chat template")


def test_a_template_that_never_ends_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("asa_jax.interop.chat_render.MAX_SECONDS", 0.5)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ImportedModelError, match="takes more than"):
        _template(tmp_path, loop).render(MESSAGES)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [("{}", "chat_template must be a template"), ("[", "broken JSON"), (None, "cannot be read")],
)
def test_a_folder_without_a_template_says_so(tmp_path, settings, reason):
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ImportedModelError, match=reason):
        load_chat_template(tmp_path)


@pytest.mark.parametrize("messages", [[], [{"content": "a"}], ["a"]])
def test_messages_have_roles(tmp_path, messages):
    with pytest.raises(ConfigError, match="messages"):
        _template(tmp_path, "").render(messages)
