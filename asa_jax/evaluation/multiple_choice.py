"""Zero-shot multiple choice and last words, by the log-likelihood of given continuations.

Each line of a JSONL file is one example, of the kind that its fields tell:

    query, choices, gold                  which choice follows the query
    context_options, continuation, gold   after which context the one continuation is likelier
    context, continuation                 whether greedy decoding gives the continuation (LAMBADA)

As in lm-eval, a query that asks ('Question:') is closed by '\\nAnswer:', one space stands before a
continuation, and the normalised score divides the log-likelihood by the bytes of the choice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import DataError
from asa_jax.evaluation.json_lines import Line, read_lines
from asa_jax.evaluation.results import ChoiceResult, Job, Result, standard_error
from asa_jax.evaluation.scorer import Scorer

FORMATS = (
    ("query", "choices", "gold"),
    ("context_options", "continuation", "gold"),
    ("context", "continuation"),
)


class Request(NamedTuple):
    """A continuation to score after a context."""

    context: str
    continuation: str


class Example(NamedTuple):
    """Continuations to compare and the index of the right one; None where there is just one."""

    requests: tuple[Request, ...]
    gold: int | None


class RequestScore(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy decoding gives it."""

    log_likelihood: float
    greedy: bool


def read_examples(path: Path) -> list[Example]:
    """Reads a .jsonl or .jsonl.gz file in one of the FORMATS.

    Raises:
        DataError: the file or a line is not of that form; names file, line and field.
    """
    return [_example(line) for line in read_lines(path)]


def _example(line: Line) -> Example:
    if "context_options" in line:
        contexts, continuation = line.texts("context_options"), line.text("continuation")
        requests = [Request(context, continuation) for context in contexts]
        return Example(tuple(requests), line.index("gold", len(requests)))
    if "query" in line:
        query, choices = line.text("query"), line.texts("choices")
        requests = [Request(_closed(query), choice) for choice in choices]
        return Example(tuple(requests), line.index("gold", len(requests)))
    if "context" in line:
        return Example((Request(line.text("context"), line.text("continuation")),), None)
    formats = "; ".join(", ".join(fields) for fields in FORMATS)
    raise DataError(f"{line.where}: not an example; expected the fields {formats}")


def _closed(query: str) -> str:
    asks = "Question:" in query and not query.rstrip().endswith("Answer:")
    return f"{query.rstrip()}\nAnswer:" if asks else query


def choice_job(path: Path, scorer: Scorer, limit: int | None) -> Job:
    """A job for a file, or its first `limit` examples.

    Raises:
        DataError: the file or a line cannot be used.
    """
    examples = read_examples(path)[:limit]
    requests = [request for example in examples for request in example.requests]
    encoded = encode_requests(scorer.tokenizer, requests)

    def run() -> list[Result]:
        scores = score_encoded(scorer, encoded)
        return [summarise(path.name.partition(".")[0], examples, scores)]

    return Job(path.name, sum(len(tokens) - 1 for tokens, _ in encoded), run)


def encode_requests(
    tokenizer: Tokenizer, requests: Sequence[Request]
) -> list[tuple[np.ndarray, int]]:
    """Tokens of each context and continuation, one space between, and the continuation's start."""
    contexts = tokenizer.encode_batch([request.context.rstrip() for request in requests])
    continuations = tokenizer.encode_batch(
        [f" {request.continuation.lstrip()}" for request in requests]
    )
    return [
        (np.concatenate([context, continuation]).astype(np.int32), len(context))
        for context, continuation in zip(contexts, continuations, strict=True)
    ]


def score_encoded(scorer: Scorer, encoded: Sequence[tuple[np.ndarray, int]]) -> list[RequestScore]:
    """Scores the tokens of each sequence from its start on.

    Args:
        scorer: runs the model.
        encoded: token ids [n], and the index of the first to count, at least 1.
    """
    scores = scorer.score([tokens for tokens, _ in encoded])
    # Scores start at the second token.
    return [
        RequestScore(
            -float(np.sum(score.nll[start - 1 :], dtype=np.float64)),
            bool(np.all(score.correct[start - 1 :])),
        )
        for score, (_, start) in zip(scores, encoded, strict=True)
    ]


def summarise(
    task: str, examples: Sequence[Example], scores: Sequence[RequestScore]
) -> ChoiceResult:
    """Accuracies and their standard errors.

    Args:
        task: name of the result.
        examples: of one file.
        scores: of their requests, in order.
    """
    rest = iter(scores)
    verdicts = [_judge(example, [next(rest) for _ in example.requests]) for example in examples]
    right, norm, nats, chance = (_mean(column) for column in zip(*verdicts, strict=True))
    accuracy = right or 0.0
    return ChoiceResult(
        task=task, examples=len(examples), accuracy=accuracy,
        accuracy_error=standard_error(accuracy, len(examples)), accuracy_norm=norm,
        accuracy_norm_error=None if norm is None else standard_error(norm, len(examples)),
        chance=chance, perplexity=None if nats is None else float(np.exp(nats)),
    )  # fmt: skip


class _Verdict(NamedTuple):
    right: float
    right_norm: float | None
    nats: float | None
    chance: float | None


def _judge(example: Example, scores: Sequence[RequestScore]) -> _Verdict:
    if example.gold is None:
        return _Verdict(float(scores[0].greedy), None, -scores[0].log_likelihood, None)
    likelihoods = np.array([score.log_likelihood for score in scores])
    right = float(np.argmax(likelihoods) == example.gold)
    texts = [request.continuation.strip() for request in example.requests]
    if len(set(texts)) == 1:  # contexts compete, and their one continuation has one length
        return _Verdict(right, None, None, 1 / len(scores))
    normalised = likelihoods / [len(text.encode()) for text in texts]
    return _Verdict(right, float(np.argmax(normalised) == example.gold), None, 1 / len(scores))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
