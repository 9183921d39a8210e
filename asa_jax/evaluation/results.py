"""What evaluation measures, as plain records, and the jobs that measure it."""

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionBucket:
    """Sums over the tokens predicted at positions first .. last of their window."""

    first: int
    last: int
    tokens: int
    text_bytes: int
    nats: float
    bits_per_byte: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """Perplexity of one text in windows of one length; the buckets add up to it."""

    source: str
    length: int
    tokens: int
    text_bytes: int
    nats: float
    bits_per_byte: float
    perplexity_per_token: float
    perplexity_per_byte: float
    buckets: Sequence[PositionBucket]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerResult:
    """Answers of one task at one length and depth.

    Depth is None where the task spreads its needles, length where a file sets it.
    `exact_match` is the share of samples with every answer right and its standard error,
    `answers_right` the share of answers, `answer_nats` the mean per token of the answers.
    """

    task: str
    length: int | None
    depth: float | None
    samples: int
    exact_match: float
    exact_match_error: float
    answers_right: float
    answer_nats: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceResult:
    """A file of choices or continuations; None where a measure does not apply.

    `accuracy` is by log-likelihood, or for a single continuation by greedy decoding;
    `accuracy_norm` by log-likelihood per byte; `chance` that of guessing; `perplexity` exp of the
    mean nats of a continuation.
    """

    task: str
    examples: int
    accuracy: float
    accuracy_error: float
    accuracy_norm: float | None
    accuracy_norm_error: float | None
    chance: float | None
    perplexity: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """A metric that lm-eval reports."""

    task: str
    metric: str
    value: float
    error: float | None


Result = PerplexityResult | AnswerResult | ChoiceResult | HarnessResult


@dataclasses.dataclass(frozen=True)
class Job:
    """A part of an evaluation, ready to run: its input was read and checked.

    Attributes:
        name: shown while it runs.
        tokens: to score, for the progress bar.
        run: does it.
    """

    name: str
    tokens: int
    run: Callable[[], list[Result]]


def standard_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent examples: sqrt(p (1 - p) / n)."""
    return (share * (1 - share) / count) ** 0.5
