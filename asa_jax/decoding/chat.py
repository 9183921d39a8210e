"""Lines of a user and answers of a model, in the form that the model was tuned on."""

import contextlib
from typing import Any

from asa_jax.data.tokenizer import Tokenizer
from asa_jax.decoding.conversation import Conversation, Stream
from asa_jax.errors import ConfigError
from asa_jax.interop.chat import (
    ASSISTANT,
    SYSTEM,
    USER,
    ChatTemplate,
    encode_messages,
    encode_reply,
)


class Chat:
    """A conversation whose turns a chat template writes; without one, lines as they stand.

    Only what a turn adds is read: the template's text behind the model's last answer.
    """

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        system_prompt: str | None = None,
    ) -> None:
        """Goes on with a conversation.

        Args:
            conversation: empty, of a chat before, or of a plain text that the chat begins behind.
            tokenizer: of the model.
            template: of the model; None: it has none.
            system_prompt: first message of the chat; None: none.

        Raises:
            ConfigError: there is a system prompt for a chat that has begun.
        """
        if system_prompt is not None and conversation.messages:
            raise ConfigError("--system_prompt: the chat of --load_cache has begun; leave it out")
        self._conversation, self._tokenizer, self._template = conversation, tokenizer, template
        self._first = [] if system_prompt is None else [_message(SYSTEM, system_prompt)]

    def answer(self, line: str, **request: Any) -> Stream:
        """Reads a line and answers it.

        Args:
            line: what the user says.
            **request: as `Conversation.answer` takes it, which says what is returned and raised.
        """
        if self._template is None:
            start = "" if self._conversation.at_line_start else "\n"
            return self._conversation.answer(f"{start}{line}\n", **request)
        messages = [*(self._conversation.messages or self._first), _message(USER, line)]
        parts = self._conversation.answer(self._encode(self._template, messages), **request)
        return self._record(messages, parts)

    def _encode(self, template: ChatTemplate, messages: list[dict[str, str]]) -> list[int]:
        if self._conversation.messages:
            return encode_reply(template, self._tokenizer, messages)
        tokens = encode_messages(template, self._tokenizer, messages)
        start = list(self._tokenizer.start_ids)
        # Behind a plain text, the start of a text is there already.
        begun = bool(self._conversation.tokens) and tokens[: len(start)] == start
        return tokens[len(start) :] if begun else tokens

    def _record(self, messages: list[dict[str, str]], parts: Stream) -> Stream:
        answer = _message(ASSISTANT, "")
        self._conversation.messages = [*messages, answer]
        with contextlib.closing(parts):
            for part in parts:
                answer["content"] += part
                yield part


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
