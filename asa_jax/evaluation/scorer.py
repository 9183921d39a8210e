"""Log-likelihoods of given sequences: the one place where evaluation runs the model.

Every task asks for the same two numbers per token: the negative log-likelihood of the token after
the ones before it, and whether it is the argmax. That is enough for retrieval too, without a
decoder: greedy decoding from a prompt yields the tokens a_1 .. a_n exactly when each a_i is the
argmax after the prompt and a_1 .. a_(i-1), that is, when every token of the answer is the argmax
under teacher forcing (by induction over i; both take the argmax of the same conditional).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from asa_jax.config import Config
from asa_jax.context_parallel import place_rows, row_multiple, row_order
from asa_jax.data.tokenizer import Tokenizer, check_vocabulary
from asa_jax.errors import DataError
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import batch_sharding
from asa_jax.training.losses import token_scores

MIN_ROW_TOKENS = 256


class TokenScores(NamedTuple):
    """What the model makes of tokens 1 .. n-1 of a sequence of n.

    Attributes:
        nll: negative log-likelihoods in nats, float32 [n - 1].
        correct: whether the token is the argmax, bool [n - 1].
    """

    nll: np.ndarray
    correct: np.ndarray


class Scorer:
    """Scores sequences in packed rows of few shapes, so that little is compiled and little padded.

    A row holds several short sequences as documents of their own (segment ids), each starting at
    a selection block. Rows are a power of two of blocks long, batches a power of two of rows.

    Attributes:
        tokenizer: turns text into the tokens of the model.
        on_tokens: called after each batch with the number of tokens that it scored.
    """

    def __init__(self, config: Config, params: Any, tokenizer: Tokenizer, mesh: Mesh) -> None:
        """Prepares scoring; nothing is compiled before the first sequence.

        Args:
            config: the run; evaluation.batch_tokens bounds a forward pass.
            params: nested dict of parameters, as `restore_params` gives.
            tokenizer: the run's tokenizer.
            mesh: devices that hold the parameters.

        Raises:
            ConfigError: the tokenizer has more tokens than the model.
        """
        check_vocabulary(tokenizer.vocab_size, config.model.vocab_size, "the tokenizer")
        self.tokenizer = tokenizer
        self.on_tokens: Callable[[int], None] = lambda count: None
        self._params, self._mesh = params, mesh
        self._vocab_size = config.model.vocab_size
        self._alignment = config.model.alignment
        self._batch_tokens = config.evaluation.batch_tokens
        self._score = _jit_score(config, mesh)

    def score(self, sequences: Sequence[np.ndarray]) -> list[TokenScores]:
        """Scores every token but the first of each sequence.

        Args:
            sequences: token ids, int [n] each with its own n >= 2.

        Returns:
            The scores of each sequence, in order.

        Raises:
            DataError: a token id is not in the model's vocabulary.
        """
        if not sequences:
            return []
        self._check_tokens(sequences)
        sizes = [len(sequence) - 1 for sequence in sequences]
        row_tokens = self._row_tokens(max(sizes))
        rows = pack_rows(sizes, row_tokens, self._alignment)
        scores: list[TokenScores | None] = [None] * len(sequences)
        for batch_rows in _batches(rows, self._num_rows(len(rows), row_tokens)):
            batch = fill_batch(sequences, batch_rows, row_tokens)
            nll, correct = self._run(batch)
            for index, row, start in _places(batch_rows):
                piece = np.s_[row, start : start + sizes[index]]
                scores[index] = TokenScores(nll[piece], correct[piece])
            self.on_tokens(sum(sizes[index] for index, _, _ in _places(batch_rows)))
        return scores  # type: ignore[return-value]

    def _check_tokens(self, sequences: Sequence[np.ndarray]) -> None:
        for index, sequence in enumerate(sequences):
            low, high = int(np.min(sequence)), int(np.max(sequence))
            if low < 0 or high >= self._vocab_size:
                raise DataError(
                    f"sequence {index}: token id {low if low < 0 else high} is not in the model's "
                    f"vocabulary of {self._vocab_size}"
                )

    def _row_tokens(self, longest: int) -> int:
        tokens = row_multiple(self._alignment, self._mesh.shape["context"])
        while tokens < max(longest, MIN_ROW_TOKENS):
            tokens *= 2
        return tokens

    def _num_rows(self, available: int, row_tokens: int) -> int:
        shards = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        num_rows = shards
        while num_rows < available and 2 * num_rows * row_tokens <= self._batch_tokens:
            num_rows *= 2
        return num_rows

    def _run(self, batch: "Batch") -> tuple[np.ndarray, np.ndarray]:
        context = self._mesh.shape["context"]
        placed = tuple(place_rows(rows, context) for rows in batch)
        order = row_order(batch.inputs.shape[1], context)
        with jax.set_mesh(self._mesh):
            nll, correct = self._score(
                self._params, *jax.device_put(placed, batch_sharding(self._mesh))
            )
        return np.asarray(nll)[:, order], np.asarray(correct)[:, order]


class Batch(NamedTuple):
    """Packed rows, int32 [B, T] each; segment 0 is padding."""

    inputs: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    targets: np.ndarray


# A row as the sequences in it: their index and the position where they start.
Row = list[tuple[int, int]]


def pack_rows(sizes: Sequence[int], row_tokens: int, alignment: int) -> list[Row]:
    """Puts sequences into rows, longest first, opening a row when the next does not fit.

    Args:
        sizes: tokens of each sequence, at most row_tokens.
        row_tokens: length of a row.
        alignment: every sequence starts at a multiple of it.

    Returns:
        For each row, the index and the start of its sequences.
    """
    rows: list[Row] = []
    start = row_tokens
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if start + sizes[index] > row_tokens:
            rows.append([])
            start = 0
        rows[-1].append((index, start))
        start += -(-sizes[index] // alignment) * alignment
    return rows


def fill_batch(sequences: Sequence[np.ndarray], rows: Sequence[Row], row_tokens: int) -> Batch:
    """Writes the sequences of `rows` into arrays [len(rows), row_tokens]."""
    batch = Batch(*(np.zeros((len(rows), row_tokens), np.int32) for _ in Batch._fields))
    for row, entries in enumerate(rows):
        for segment, (index, start) in enumerate(entries, start=1):
            sequence = sequences[index]
            place = np.s_[row, start : start + len(sequence) - 1]
            batch.inputs[place] = sequence[:-1]
            batch.targets[place] = sequence[1:]
            batch.positions[place] = np.arange(len(sequence) - 1)
            batch.segment_ids[place] = segment
    return batch


def _batches(rows: list[Row], num_rows: int) -> Iterator[list[Row]]:
    for first in range(0, len(rows), num_rows):
        batch = rows[first : first + num_rows]
        yield batch + [[]] * (num_rows - len(batch))


def _places(rows: Sequence[Row]) -> Iterator[tuple[int, int, int]]:
    for row, entries in enumerate(rows):
        for index, start in entries:
            yield index, row, start


def _jit_score(config: Config, mesh: Mesh) -> Callable[..., tuple[jax.Array, jax.Array]]:
    graphdef, _, _ = abstract_model(config.model)
    # Replicated results can be read on every process.
    replicated = NamedSharding(mesh, P())

    def score(
        params: Any,
        inputs: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        targets: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        hidden = model(inputs, positions, segment_ids)
        return token_scores(hidden, model.unembedding(), targets, config.training.loss_chunk_tokens)

    return jax.jit(score, out_shardings=(replicated, replicated))
