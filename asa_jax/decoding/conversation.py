"""A text that is read and written in turns, and never read twice."""

import collections.abc
import contextlib
from collections.abc import Sequence
from pathlib import Path

from asa_jax.decoding.cache_file import read_cache_file, write_cache_file
from asa_jax.decoding.continuation import Continuation
from asa_jax.decoding.generate import PLAIN, Generator
from asa_jax.decoding.rows import STREAM_TOKENS, Progress, Rows, SavedRow
from asa_jax.decoding.settings import Sampling, check_request

# Gives text as it comes, and can be closed.
Stream = collections.abc.Generator[str]


class Conversation:
    """One text whose cache grows with each turn.

    A turn is text that is read and the answer that is drawn after it; both stay. The outcome is
    that of reading the whole text at once.

    Attributes:
        messages: those that a chat template made the text of, saved with it; none if it is plain.
    """

    def __init__(self, generator: Generator) -> None:
        """Starts an empty text; allocates nothing.

        Args:
            generator: of the answers.
        """
        self._generator = generator
        self._rows: Rows | None = None
        self.messages: list[dict[str, str]] = []

    @classmethod
    def load(cls, generator: Generator, path: Path) -> "Conversation":
        """Goes on with a text that `save` wrote; what it draws is the same, bit for bit.

        Raises:
            CheckpointError: the file is damaged or belongs to another model.
            UserError: its cache does not fit into memory.
        """
        saved = read_cache_file(path, generator.runner, generator.tokenizer.fingerprint)
        conversation = cls(generator)
        conversation._rows = Rows.restore(generator.runner, saved)
        conversation.messages = [dict(message) for message in saved.messages]
        return conversation

    @property
    def tokens(self) -> list[int]:
        """What the cache holds: all turns, but for tokens that ended an answer's document."""
        return list(self._rows.tokens[0]) if self._rows else []

    @property
    def at_line_start(self) -> bool:
        """Whether a new line would begin without a line break."""
        tokenizer = self._generator.tokenizer
        return not self.tokens or tokenizer.decode(self.tokens[-1:]).endswith("\n")

    def save(self, path: Path) -> None:
        """Writes text and cache to one file.

        Raises:
            UserError: there is nothing to save yet, or the file cannot be written.
        """
        saved = self._rows.save() if self._rows else SavedRow([], {}, 0)
        saved = saved._replace(messages=self.messages)
        write_cache_file(path, saved, self._generator.runner, self._generator.tokenizer.fingerprint)

    def answer(
        self,
        text: str | Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling = PLAIN,
        seed: int = 0,
        stop: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> Stream:
        """Reads a text and continues it.

        Args:
            text: what comes next, or its token ids; an empty text is read as a line break.
            max_tokens: most tokens of the answer; 0: only read.
            sampling: how they are drawn.
            seed: of the draws.
            stop: strings that end the answer. They are not given out, but stay in the text; to stop
                right behind them, each token is a dispatch.
            progress: told how far the text is read.

        Returns:
            Gives the answer as it comes, in whole characters. An answer that is not taken to its
            end stays as far as it was drawn.

        Raises:
            ConfigError: a setting is out of range, or the whole text becomes too long.
            UserError: the cache does not fit into memory.
        """
        check_request(max_tokens, [seed], stop, least_tokens=0)
        new = self._encode(text)
        sampling = sampling.checked()
        rows = self._with_room(len(new), max_tokens)
        row = Continuation(self._generator.tokenizer, [*rows.tokens[0], *new], stop)

        def answer() -> Stream:
            if isinstance(text, str):
                self.messages = []  # from here on no template wrote the text
            rows.read([new], progress)
            drawn = rows.draw(
                max_tokens, sampling=sampling, seeds=[seed],
                ends=self._generator.tokenizer.end_ids,
                steps_per_dispatch=1 if stop else STREAM_TOKENS,
                dispatches_ahead=0 if stop else 1,
            )  # fmt: skip
            with contextlib.closing(drawn):
                for part in drawn:
                    yield row.push(part.tokens[0].tolist())
                    if row.finish_reason:
                        return
            yield row.flush()

        return answer()

    def _encode(self, text: str | Sequence[int]) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        return self._generator.encode_prompt(text, continues=bool(self.tokens))

    def _with_room(self, num_new: int, max_tokens: int) -> Rows:
        """The row, with a cache for so many tokens more."""
        runner = self._generator.runner
        needed = runner.cache_length(len(self.tokens) + num_new, max_tokens)
        if self._rows is None:
            self._rows = Rows.empty(runner, 1, needed)
        elif needed > self._rows.cache_length:
            self._rows.resize(needed)
        return self._rows
