"""The text of one row as it is drawn: whole characters, up to its end or a stop string."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from asa_jax.data.tokenizer import StreamingDecoder, Tokenizer

# The document ended, a stop string came, or there were enough tokens.
FinishReason = Literal["end", "stop", "length"]


class Alternative(NamedTuple):
    """A likely token and the natural logarithm of its probability."""

    token: int
    log_probability: float


class Completion(NamedTuple):
    """How a prompt went on.

    Attributes:
        text: of the continuation, without what ended it.
        finish_reason: why it ended.
        tokens: that were drawn, with what ended it.
        log_probabilities: of each, natural logarithms by the model, before sampling settings.
        alternatives: the most likely tokens in the place of each, if asked for.
    """

    text: str
    finish_reason: FinishReason
    tokens: list[int]
    log_probabilities: list[float]
    alternatives: list[list[Alternative]]


class Continuation:
    """Turns the tokens of a row into text, and holds back what may yet change or go.

    Attributes:
        finish_reason: None while the text goes on.
        num_tokens: that were taken.
    """

    # Decoders treat the start of a text in their own ways, so it goes on from the prompt's end.
    _CONTEXT_TOKENS = 8

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        """Starts behind a prompt.

        Args:
            tokenizer: of the tokens.
            prompt: token ids.
            stop: strings that end the text; neither they nor what follows is given out.
        """
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        self._ends, self._stop, self._held = tokenizer.end_ids, tuple(stop), ""
        self._decoder = StreamingDecoder(tokenizer)
        for token in prompt[-self._CONTEXT_TOKENS :]:
            self._decoder.push(token)

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens and returns the text that is complete with them."""
        text = ""
        for token in tokens:
            if self.finish_reason:
                break
            self.num_tokens += 1
            text += self._finish("end") if token in self._ends else self._add(token)
        return text

    def flush(self) -> str:
        """Returns what is held back, at the end of the stream."""
        return "" if self.finish_reason else self._finish("length")

    def _add(self, token: int) -> str:
        self._held += self._decoder.push(token)
        return self._cut() or self._give(len(self._held) - self._begun_stop())

    def _finish(self, reason: FinishReason) -> str:
        self._held += self._decoder.flush()
        text = self._cut() or self._give(len(self._held))
        self.finish_reason = self.finish_reason or reason
        return text

    def _cut(self) -> str:
        """The text before the first stop string, if there is one; ends the continuation there."""
        places = [self._held.find(text) for text in self._stop if text in self._held]
        if not places:
            return ""
        self.finish_reason = "stop"
        text = self._give(min(places))
        self._held = ""
        return text

    def _begun_stop(self) -> int:
        """Characters at the end of what is held that may be the start of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        sizes = range(min(longest, len(self._held)), 0, -1)
        begun = (n for n in sizes if any(s.startswith(self._held[-n:]) for s in self._stop))
        return next(begun, 0)

    def _give(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text
