"""Prompts with known answers: how they are put together from text, and how they are scored."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import ConfigError
from asa_jax.evaluation.scorer import Scorer


class Question(NamedTuple):
    """Text that asks and the text that greedy decoding must give after it."""

    prompt: str
    answer: str


class Needle(NamedTuple):
    """A sentence and its place among the filler, from 0 (before all of it) to 1 (after it)."""

    depth: float
    text: str


class Sample(NamedTuple):
    """Tokens of a prompt with its answers filled in.

    Attributes:
        tokens: int32 [n].
        answers: where the answers lie in `tokens`, in order, apart from one another.
    """

    tokens: np.ndarray
    answers: tuple[slice, ...]


class AnswerScore(NamedTuple):
    """How well one sample was answered.

    Attributes:
        exact: 1 if greedy decoding gives every answer, else 0. Of several answers, each is decoded
            after the questions and right answers before it.
        share: fraction of the answers that greedy decoding gives.
        nll: mean negative log-likelihood of the answers' tokens in nats.
    """

    exact: float
    share: float
    nll: float


def assemble(
    tokenizer: Tokenizer,
    *,
    intro: str,
    filler: Iterable[np.ndarray],
    needles: Sequence[Needle],
    questions: Sequence[Question],
    length: int,
    min_filler_tokens: int = 0,
    cut_filler: bool = True,
) -> Sample:
    """Hides needles in filler and appends the questions.

    Pieces of text are tokenized one by one, so that the position of each is known.

    Args:
        tokenizer: encodes the texts.
        intro: first words of the prompt.
        filler: token ids of sentences, without end.
        needles: sentences to hide, each at the sentence boundary nearest below its depth.
        questions: asked and answered in turn at the end.
        length: tokens of the sample.
        min_filler_tokens: filler below which the task makes no sense.
        cut_filler: whether the last sentence is cut to reach `length` exactly, or left out.

    Returns:
        The sample.

    Raises:
        ConfigError: `length` is too small for the parts that are not filler.
    """
    head = encode(tokenizer, intro)
    hidden = [(needle.depth, encode(tokenizer, needle.text)) for needle in needles]
    fixed = join(tokenizer, [head, *(tokens for _, tokens in hidden)], questions)
    budget = length - len(fixed.tokens)
    if budget < min_filler_tokens:
        raise ConfigError(
            f"config.evaluation.lengths = {length}: too short for a retrieval task, which takes at "
            f"least {length - budget + min_filler_tokens} tokens with this tokenizer"
        )
    sentences = _take(filler, budget, cut_filler)
    return join(tokenizer, [head, *hide(sentences, hidden)], questions)


def join(
    tokenizer: Tokenizer, context: Sequence[np.ndarray], questions: Sequence[Question]
) -> Sample:
    """Appends questions, each with its answer, to the tokens of a context."""
    pieces = list(context)
    answers = []
    end = sum(map(len, pieces))
    for question in questions:
        prompt, answer = encode(tokenizer, question.prompt), encode(tokenizer, question.answer)
        pieces += [prompt, answer]
        answers.append(slice(end + len(prompt), end + len(prompt) + len(answer)))
        end = answers[-1].stop
    return Sample(np.concatenate(pieces), tuple(answers))


def hide(
    sentences: Sequence[np.ndarray], needles: Sequence[tuple[float, np.ndarray]]
) -> list[np.ndarray]:
    """Inserts each needle before the last sentence that starts within its depth of the filler."""
    ends = np.cumsum([0] + [len(sentence) for sentence in sentences])
    body: list[np.ndarray] = []
    done = 0
    for depth, tokens in sorted(needles, key=lambda needle: needle[0]):
        place = int(np.searchsorted(ends, depth * ends[-1], side="right")) - 1
        body += [*sentences[done:place], tokens]
        done = place
    return [*body, *sentences[done:]]


def score_samples(scorer: Scorer, samples: Sequence[Sample]) -> list[AnswerScore]:
    """Scores the answers of each sample under teacher forcing (see `scorer`)."""
    scores = scorer.score([sample.tokens for sample in samples])
    results = []
    for sample, score in zip(samples, scores, strict=True):
        # Scores start at the second token.
        spans = [slice(span.start - 1, span.stop - 1) for span in sample.answers]
        right = [bool(np.all(score.correct[span])) for span in spans]
        nll = np.concatenate([score.nll[span] for span in spans])
        results.append(AnswerScore(float(all(right)), float(np.mean(right)), float(np.mean(nll))))
    return results


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids of a piece of text, int32 [n]."""
    return np.array(tokenizer.encode(text), np.int32)


def _take(filler: Iterable[np.ndarray], budget: int, cut: bool) -> list[np.ndarray]:
    sentences: list[np.ndarray] = []
    for sentence in filler:
        if budget == 0 or (len(sentence) > budget and not cut):
            break
        sentences.append(sentence[:budget])
        budget -= len(sentences[-1])
    return sentences
