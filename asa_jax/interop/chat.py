"""Conversations as the text and the tokens that a model was tuned on: chat templates.

The template is `chat_template.jinja` of the model folder, or `chat_template` of its
tokenizer_config.json; chat_render.py runs it. Imports no jax.
"""

import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import ConfigError, ImportedModelError
from asa_jax.interop import chat_render
from asa_jax.interop.safetensors_files import read_json_object
from asa_jax.trained_run import TOKENIZER_CONFIG

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 2**20
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")

_TOO_SLOW = f"takes more than {chat_render.MAX_SECONDS} s"

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
Message = Mapping[str, Any]


class ChatTemplate(NamedTuple):
    """A template and the special tokens that it may write.

    Attributes:
        path: of its file, which errors name.
        source: jinja2.
        special_tokens: text of each by its role: bos_token, eos_token, ...
    """

    path: Path
    source: str
    special_tokens: Mapping[str, str]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Writes a conversation as one text.

        Args:
            messages: each with a `role` and usually a `content`.
            add_generation_prompt: whether the text ends where the model's turn begins.
            tools: JSON schemas of functions that the model may call.

        Returns:
            The text.

        Raises:
            ConfigError: a message has no role.
            ImportedModelError: the template fails, refuses the messages, or takes too long.
        """
        _check(messages)
        variables = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": None,
            **self.special_tokens,
        }
        answer = self._run({"template": self.source, "variables": variables})
        if "error" in answer:
            raise ImportedModelError(f"{self.path}: the chat template: {answer['error']}")
        text = answer["text"]
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ImportedModelError(f"{self.path}: the chat template: writes half a character")
        return text

    def _run(self, request: dict[str, Any]) -> dict[str, str]:
        command = [sys.executable, "-I", chat_render.__file__]
        try:
            # The limit of the process itself is of processor time.
            done = subprocess.run(
                command, input=json.dumps(request), capture_output=True, text=True,
                encoding="utf-8", timeout=2 * chat_render.MAX_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": _TOO_SLOW}
        if done.returncode == -signal.SIGXCPU:
            return {"error": _TOO_SLOW}
        if done.returncode:
            return {
                "error": f"its process failed with code {done.returncode}: {done.stderr[-200:]}"
            }
        return json.loads(done.stdout)


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """As `load_chat_template`, and None where a folder has none."""
    own, settings = folder / TEMPLATE_FILE, folder / TOKENIZER_CONFIG
    there = own.exists() or (
        settings.exists() and read_json_object(settings).get("chat_template") is not None
    )
    return load_chat_template(folder) if there else None


def load_chat_template(folder: Path) -> ChatTemplate:
    """Loads the chat template of a model folder.

    Args:
        folder: with tokenizer_config.json, and with chat_template.jinja or without.

    Returns:
        The template; of several in tokenizer_config.json the one named 'default'.

    Raises:
        ImportedModelError: there is none, or it cannot be read.
    """
    settings, own = folder / TOKENIZER_CONFIG, folder / TEMPLATE_FILE
    fields = read_json_object(settings) if settings.exists() or not own.exists() else {}
    tokens = {name: _content(fields.get(name)) for name in SPECIAL_TOKENS}
    special_tokens = {name: token for name, token in tokens.items() if isinstance(token, str)}
    if own.exists():
        return ChatTemplate(own, _read(own), special_tokens)
    source = fields.get("chat_template")
    if isinstance(source, list):
        named = [entry for entry in source if isinstance(entry, dict)]
        source = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE_BYTES:
        raise ImportedModelError(
            f"{settings}: chat_template must be a template of at most {MAX_TEMPLATE_BYTES} "
            f"characters, or {own} be one"
        )
    return ChatTemplate(settings, source, special_tokens)


def encode_messages(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], **options: Any
) -> list[int]:
    """Tokens of a conversation.

    Args:
        template: of the model.
        tokenizer: of the model.
        messages: the conversation.
        **options: of `ChatTemplate.render`.

    Returns:
        Token ids; special tokens are those that the template writes.

    Raises:
        ConfigError: a message has no role, or spells a special token, which would end its turn.
        ImportedModelError: the template fails, refuses the messages, or takes too long.
    """
    chat = _tokenizer_of_templates(template, tokenizer)
    _check_spelling(chat, messages, 0)
    return chat.encode(template.render(messages, **options), add_special_tokens=False).ids


def encode_reply(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]
) -> list[int]:
    """Tokens of a conversation that come behind the model's last answer.

    The text of that answer does not matter, so that the tokens follow those that were drawn.

    Args:
        template: of the model.
        tokenizer: of the model.
        messages: the conversation; one is of the role 'assistant'.

    Returns:
        Token ids of what ends the answer, of the messages since, and of where the next one begins.

    Raises:
        ConfigError: a message since has no role, or spells a special token.
        ImportedModelError: the template fails, or does not give the answer back once.
    """
    chat = _tokenizer_of_templates(template, tokenizer)
    last = max(i for i, message in enumerate(messages) if message["role"] == ASSISTANT)
    since = messages[last + 1 :]
    _check_spelling(chat, since, last + 1)
    mark = uuid.uuid4().hex
    marked = [*messages[:last], {**messages[last], "content": mark}, *since]
    _, *behind = template.render(marked).split(mark)
    if len(behind) != 1:
        raise ImportedModelError(
            f"{template.path}: the chat template: writes an answer {len(behind)} times; only one "
            "that writes it once can go on with a chat"
        )
    return chat.encode(behind[0], add_special_tokens=False).ids


def _tokenizer_of_templates(template: ChatTemplate, tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as it reads what a template wrote: special tokens are recognised."""
    if tokenizer.source is None:
        raise ConfigError(
            f"{template.path}: a tokenizer of plain bytes has no special tokens for a chat template"
        )
    chat = tokenizers.Tokenizer.from_str(tokenizer.source)
    chat.no_truncation()
    chat.no_padding()
    return chat


def _check_spelling(chat: tokenizers.Tokenizer, messages: Sequence[Message], first: int) -> None:
    added = chat.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    for i, message in enumerate(messages, first):
        spelled = json.dumps(message, ensure_ascii=False)
        for token in special:
            if token in spelled:
                raise ConfigError(f"messages[{i}]: spells the special token {token!r}")


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise ConfigError("messages: must hold at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f"messages[{i}]: must be a mapping with a role, such as 'user'")


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEMPLATE_BYTES + 1)
        source = content.decode()
    except OSError as error:
        raise ImportedModelError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ImportedModelError(f"{path}: byte {error.start} is not UTF-8") from None
    if len(content) > MAX_TEMPLATE_BYTES:
        raise ImportedModelError(f"{path}: larger than {MAX_TEMPLATE_BYTES} bytes")
    return source
