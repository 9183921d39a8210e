"""Rows of tokens that grow by reading and by drawing, with their caches."""

import collections
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from asa_jax.decoding.runner import Runner, make_draws
from asa_jax.decoding.settings import Sampling
from asa_jax.decoding.steps import Drawn

# Tokens of one dispatch of a stream: few enough to come as they are drawn, many enough to hide what
# a dispatch costs.
STREAM_TOKENS = 16

# Told how many tokens of a row are read, and of how many.
Progress = Callable[[int, int], None]


class Rows:
    """Texts on the device.

    Attributes:
        tokens: what the cache holds of each row, which is all that was read or drawn; the token
            that ends a document is not read, because training never reads it.
    """

    def __init__(self, runner: Runner, num_rows: int, cache_length: int) -> None:
        """Allocates caches for rows of at most `cache_length` tokens.

        Raises:
            UserError: they do not fit into memory.
        """
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self._runner, self._cache_length = runner, cache_length
        self._state = runner.empty(num_rows, cache_length)

    def read(self, new: Sequence[Sequence[int]], progress: Progress | None = None) -> None:
        """Appends tokens to each row, chunk by chunk; their rows together fit into the caches.

        Args:
            new: token ids for each row.
            progress: called after each chunk.
        """
        alignment = self._runner.alignment
        first = min(map(len, self.tokens)) // alignment * alignment
        for row, tokens in zip(self.tokens, new, strict=True):
            row.extend(tokens)
        lengths = np.zeros(self._state.lengths.size, np.int32)
        lengths[: len(new)] = [len(row) for row in self.tokens]
        last = int(max(lengths))
        size = self._runner.chunk_size(last - first, self._cache_length)
        for offset in range(first, last, size):
            # The last chunk may overlap with the one before it.
            offset = min(offset, self._cache_length - size)
            chunk = self._slice(offset, size)
            self._state = self._runner.read(self._state, chunk, offset, lengths)
            if progress:
                jax.block_until_ready(self._state.lengths)
                progress(min(offset + size, last) - first, last - first)

    def _slice(self, offset: int, size: int) -> np.ndarray:
        """Tokens int32 [B, size] from a position on, 0 behind the rows."""
        tokens = np.zeros((self._state.lengths.size, size), np.int32)
        for row, known in zip(tokens, self.tokens, strict=False):
            part = known[offset : offset + size]
            row[: len(part)] = part
        return tokens

    def draw(
        self,
        max_tokens: int,
        *,
        sampling: Sampling,
        seeds: Sequence[int],
        end: int | None,
        num_alternatives: int = 0,
        steps_per_dispatch: int = STREAM_TOKENS,
        dispatches_ahead: int = 1,
    ) -> Iterator[Drawn]:
        """Draws tokens until every row has ended or has `max_tokens` more.

        Args:
            max_tokens: most tokens to draw for each row.
            sampling: how they are drawn.
            seeds: of each row.
            end: token that ends a row; None: nothing does.
            num_alternatives: most likely tokens to give beside each.
            steps_per_dispatch: tokens that are given at a time.
            dispatches_ahead: dispatches under way while the caller has what the last one gave, so
                that the device does not wait. What they draw belongs to the rows even if the caller
                stops before it comes.

        Returns:
            Gives what was drawn, as numpy arrays of the drawn columns.
        """
        draws = make_draws(seeds, self._state.lengths.size, end, sampling)
        size = max(STREAM_TOKENS, 1 << (steps_per_dispatch - 1).bit_length())
        waiting: collections.deque[Drawn] = collections.deque()
        ended = [False] * len(self.tokens)
        try:
            for first in range(0, max_tokens, steps_per_dispatch):
                steps = min(steps_per_dispatch, max_tokens - first)
                self._state, drawn = self._runner.draw(
                    self._state, draws, steps, size=size, num_alternatives=num_alternatives
                )
                waiting.append(drawn)
                if len(waiting) > dispatches_ahead:
                    yield self._take(waiting.popleft(), end, ended)
                if all(ended):
                    break
            while waiting and not all(ended):
                yield self._take(waiting.popleft(), end, ended)
        finally:
            while waiting:
                self._take(waiting.popleft(), end, ended)

    def _take(self, drawn: Drawn, end: int | None, ended: list[bool]) -> Drawn:
        """Brings what was drawn to the host and appends it to the rows that have not ended."""
        drawn = self._runner.fetch(drawn)
        count = int(drawn.num_drawn)
        drawn = Drawn._make([*(column[: len(ended), :count] for column in drawn[:-1]), count])
        for row, tokens in enumerate(drawn.tokens.tolist()):
            for token in tokens:
                ended[row] |= token == end
                if ended[row]:
                    break
                self.tokens[row].append(token)
        return drawn
