"""The texts on which sparse decoders are compared with full attention.

`text`: pieces of real text. `jumps`: a piece of text, then short snippets of it from places all
over; where one ends and the next begins, other blocks are needed at once, which is what a choice
that is one step late cannot have. Tasks: questions about what was hidden (evaluation/retrieval.py).
"""

import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from asa_jax.async_tls.fidelity_options import Options
from asa_jax.errors import DataError
from asa_jax.evaluation import retrieval
from asa_jax.evaluation.perplexity import Source, choose_windows, text_sources
from asa_jax.evaluation.samples import Sample

TEXT, JUMPS = "text", "jumps"
SNIPPET_TOKENS = 16
TASKS = {
    "needle": retrieval.single_text,
    "multi_key": retrieval.multi_key,
    "variable_tracking": retrieval.variable_tracking,
    "frequent_words": retrieval.frequent_words,
}
# Tokens in front of the first answer that are decoded too: at least those of the question.
_QUESTION_TOKENS = 32
_TASK_TAIL_MULTIPLE = 64


class Context(NamedTuple):
    """A text whose last tokens are decoded.

    Attributes:
        kind: TEXT, JUMPS or a task.
        number: among those of its kind and length.
        tokens: int32 [length + 1].
        tail: tokens that are predicted, the last ones.
        answers: of a task, where they lie among the predicted tokens.
    """

    kind: str
    number: int
    tokens: np.ndarray
    tail: int
    answers: tuple[slice, ...]

    @property
    def length(self) -> int:
        """Tokens that the cache holds at the end."""
        return len(self.tokens) - 1

    @property
    def name(self) -> str:
        """Unlike those of all other contexts."""
        return f"{self.kind}, {self.length} tokens, number {self.number}"


def make_contexts(options: Options) -> list[Context]:
    """All contexts, in such an order that what was measured until an interrupt is balanced.

    Raises:
        DataError: a text is too short.
    """
    sizes = zip(options.lengths, options.num_contexts, strict=True)
    sources = text_sources(options.text, options.tokenizer)
    by_length = [
        list(pieces(sources, length, number, options.tail_tokens)) for length, number in sizes
    ]
    jumps = [_with_jumps(pieces[0]) for pieces in by_length[-2:-1] or by_length[:1]]
    tasks = [list(_task_contexts(options, name)) for name in TASKS]
    columns = [*by_length, jumps, *tasks]
    return [one for row in itertools.zip_longest(*columns) for one in row if one is not None]


def pieces(sources: Sequence[Source], length: int, count: int, tail: int) -> Iterator[Context]:
    """Pieces of texts in turn, evenly spread over each.

    Args:
        sources: the texts.
        length: tokens of a piece but for the last, which is only predicted.
        count: of them.
        tail: tokens that are decoded, the last ones.

    Raises:
        DataError: a text is too short.
    """
    of_source = []
    for source in sources:
        windows = choose_windows(source.parts, length, sys.maxsize)
        whole = [window for window in windows if window.tokens == length + 1]
        if not whole:
            raise DataError(f"{source.name}: has no {length + 1} tokens; give a longer text")
        places = np.linspace(0, len(whole) - 1, min(-(-count // len(sources)), len(whole)))
        of_source.append([(source, whole[place]) for place in places.round().astype(int)])
    in_turn = [one for row in itertools.zip_longest(*of_source) for one in row if one is not None]
    for number, (source, window) in enumerate(in_turn[:count]):
        tokens = source.parts[window.part].read(window.start, window.tokens)
        yield Context(TEXT, number, tokens, tail, ())


def _with_jumps(piece: Context) -> Context:
    """The same with snippets of its earlier tokens in the place of its last."""
    rng = random.Random(piece.length)
    tail = -(-piece.tail // SNIPPET_TOKENS) * SNIPPET_TOKENS
    before = piece.length - tail
    starts = [rng.randrange(before - SNIPPET_TOKENS) for _ in range(tail // SNIPPET_TOKENS)]
    snippets = [piece.tokens[start : start + SNIPPET_TOKENS] for start in starts]
    tokens = np.concatenate([piece.tokens[: before + 1], *snippets])
    return Context(JUMPS, 0, tokens, tail, ())


def _task_contexts(options: Options, name: str) -> Iterator[Context]:
    haystack = retrieval.read_haystack(options.filler, options.tokenizer)
    for number in range(options.num_samples):
        depth = (number + 0.5) / options.num_samples
        rng = random.Random(f"{name} {number}")
        sample = TASKS[name](rng, haystack, options.task_length + 1, depth)
        yield _of_sample(name, number, sample)


def _of_sample(name: str, number: int, sample: Sample) -> Context:
    size = len(sample.tokens)
    tail = size - sample.answers[0].start + _QUESTION_TOKENS
    tail = -(-tail // _TASK_TAIL_MULTIPLE) * _TASK_TAIL_MULTIPLE
    first = size - tail
    answers = tuple(slice(a.start - first, a.stop - first) for a in sample.answers)
    return Context(name, number, sample.tokens, tail, answers)
