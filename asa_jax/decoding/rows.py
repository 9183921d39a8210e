"""Rows of tokens that grow by reading and by drawing, with their caches."""

import collections
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from asa_jax.decoding.interrupts import interrupts_later
from asa_jax.decoding.runner import Runner, make_draws
from asa_jax.decoding.settings import Sampling
from asa_jax.decoding.steps import DecodeState, Drawn

# Tokens of one dispatch of a stream: few enough to come as they are drawn, many enough to hide what
# a dispatch costs.
STREAM_TOKENS = 16

# Told how many tokens of a row are read, and of how many.
Progress = Callable[[int, int], None]


class SavedRow(NamedTuple):
    """A row on the host.

    Attributes:
        tokens: that the cache holds.
        arrays: of the state by name, with caches of `saved_length` tokens.
        cache_length: of the caches that the row had, and will have.
        messages: of the chat that the row is.
    """

    tokens: list[int]
    arrays: dict[str, np.ndarray]
    cache_length: int
    messages: Sequence[Mapping[str, str]] = ()


class Rows:
    """Texts on the device.

    Attributes:
        tokens: what the cache holds of each row, which is all that was read or drawn; the token
            that ends a document is not read, because training never reads it.
        cache_length: most tokens of a row.
    """

    def __init__(
        self, runner: Runner, tokens: list[list[int]], state: DecodeState, cache_length: int
    ) -> None:
        """Takes over rows; use `empty` or `restore`.

        Args:
            runner: of the model.
            tokens: of each row.
            state: of the rows.
            cache_length: of its caches.
        """
        self.tokens, self.cache_length = tokens, cache_length
        self._runner, self._state = runner, state

    @classmethod
    def empty(cls, runner: Runner, num_rows: int, cache_length: int) -> "Rows":
        """Rows without tokens.

        Raises:
            UserError: their caches do not fit into memory.
        """
        tokens: list[list[int]] = [[] for _ in range(num_rows)]
        return cls(runner, tokens, runner.empty(num_rows, cache_length), cache_length)

    @classmethod
    def restore(cls, runner: Runner, saved: SavedRow) -> "Rows":
        """One row as it was when it was saved.

        Raises:
            UserError: its cache does not fit into memory.
        """
        named = named_arrays(runner.shapes(saved_length(runner, saved.tokens)))
        structure = jax.tree.structure(runner.shapes(saved.cache_length))
        state = jax.tree.unflatten(structure, [saved.arrays[name] for name in named])
        state = runner.resize(state, saved.cache_length)
        return cls(runner, [saved.tokens], state, saved.cache_length)

    def save(self) -> SavedRow:
        """The only row, on the host."""
        (tokens,) = self.tokens
        state = self._runner.resize(self._state, saved_length(self._runner, tokens))
        row = jax.tree.map(lambda array: array[:1], self._runner.fetch(state))
        return SavedRow(list(tokens), named_arrays(row), self.cache_length)

    def read(self, new: Sequence[Sequence[int]], progress: Progress | None = None) -> None:
        """Appends tokens to each row, chunk by chunk; their rows together fit into the caches.

        Args:
            new: token ids for each row.
            progress: called after each chunk.
        """
        texts = [[*held, *more] for held, more in zip(self.tokens, new, strict=True)]
        lengths = np.zeros(self._state.lengths.size, np.int32)
        lengths[: len(texts)] = [len(text) for text in texts]
        first, last = self._runner.block_start(min(map(len, self.tokens))), int(max(lengths))
        size = self._runner.chunk_size(last - first, self.cache_length)
        for offset in range(first, last, size):
            # The last chunk may overlap with the one before it.
            offset = min(offset, self.cache_length - size)
            chunk = _slice(texts, len(lengths), offset, size)
            with interrupts_later():
                self._state = self._runner.read(self._state, chunk, offset, lengths)
                # Chunk by chunk, so that what is read is known after an interrupt too.
                for row, text in zip(self.tokens, texts, strict=True):
                    row.extend(text[len(row) : offset + size])
            if progress:
                jax.block_until_ready(self._state.lengths)
                progress(min(offset + size, last) - first, last - first)

    def resize(self, cache_length: int) -> None:
        """Brings the caches to another length, which all rows fit in."""
        if cache_length != self.cache_length:
            with interrupts_later():
                self._state = self._runner.resize(self._state, cache_length)
                self.cache_length = cache_length

    def draw(
        self,
        max_tokens: int,
        *,
        sampling: Sampling,
        seeds: Sequence[int],
        ends: Sequence[int],
        num_alternatives: int = 0,
        steps_per_dispatch: int = STREAM_TOKENS,
        dispatches_ahead: int = 1,
    ) -> Generator[Drawn]:
        """Draws tokens until every row has ended or has `max_tokens` more.

        Args:
            max_tokens: most tokens to draw for each row.
            sampling: how they are drawn.
            seeds: of each row.
            ends: tokens each of which ends a row.
            num_alternatives: most likely tokens to give beside each.
            steps_per_dispatch: tokens that are given at a time.
            dispatches_ahead: dispatches under way while the caller has what the last one gave, so
                that the device does not wait. What they draw belongs to the rows even if the caller
                stops before it comes.

        Returns:
            Gives what was drawn, as numpy arrays of the drawn columns.
        """
        draws = make_draws(seeds, self._state.lengths.size, ends, sampling)
        size = max(STREAM_TOKENS, 1 << (steps_per_dispatch - 1).bit_length())
        waiting: collections.deque[Drawn] = collections.deque()
        ended = [False] * len(self.tokens)
        try:
            for first in range(0, max_tokens, steps_per_dispatch):
                steps = min(steps_per_dispatch, max_tokens - first)
                with interrupts_later():
                    self._state, drawn = self._runner.draw(
                        self._state, draws, steps, size=size, num_alternatives=num_alternatives
                    )
                    waiting.append(drawn)
                if len(waiting) > dispatches_ahead:
                    yield self._take(waiting, ends, ended)
                if all(ended):
                    break
            while waiting and not all(ended):
                yield self._take(waiting, ends, ended)
        finally:
            with interrupts_later():
                while waiting:
                    self._take(waiting, ends, ended)

    def _take(
        self, waiting: collections.deque[Drawn], ends: Sequence[int], ended: list[bool]
    ) -> Drawn:
        """Brings the first that waits to the host and appends it to rows that have not ended."""
        *columns, num_drawn = self._runner.fetch(waiting[0])
        count = int(num_drawn)
        drawn = Drawn._make([*(column[: len(ended), :count] for column in columns), count])
        with interrupts_later():
            waiting.popleft()
            for row, tokens in enumerate(drawn.tokens.tolist()):
                for token in tokens:
                    ended[row] |= token in ends
                    if ended[row]:
                        break
                    self.tokens[row].append(token)
        return drawn


def saved_length(runner: Runner, tokens: Sequence[int]) -> int:
    """Length of the caches in which a row is saved: its tokens in whole blocks."""
    return runner.block_start(len(tokens) - 1) + runner.cfg.alignment


def named_arrays(state: DecodeState) -> dict[str, Any]:
    """The arrays of a state, or their shapes, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _slice(texts: Sequence[Sequence[int]], num_rows: int, offset: int, size: int) -> np.ndarray:
    """Tokens int32 [num_rows, size] of texts from a position on, 0 behind them."""
    tokens = np.zeros((num_rows, size), np.int32)
    for row, text in zip(tokens, texts, strict=False):
        part = text[offset : offset + size]
        row[: len(part)] = part
    return tokens
