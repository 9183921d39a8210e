"""Runs the generated tasks over a grid of lengths and depths."""

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from asa_jax.config import EvaluationConfig
from asa_jax.evaluation import recall, retrieval
from asa_jax.evaluation.results import AnswerResult, Job, Result, standard_error
from asa_jax.evaluation.retrieval import Haystack
from asa_jax.evaluation.samples import AnswerScore, Sample, score_samples
from asa_jax.evaluation.scorer import Scorer

# A task makes a sample of a length in tokens with its needle at a depth.
Task = Callable[[random.Random, Haystack, int, float], Sample]

TASKS_BY_DEPTH: dict[str, Task] = {
    "single_noise": retrieval.single_noise,
    "single_text": retrieval.single_text,
    "single_word": retrieval.single_word,
    "single_uuid": retrieval.single_uuid,
    "multi_key": retrieval.multi_key,
    "key_value": recall.key_value,
}
TASKS_BY_LENGTH: dict[str, Task] = {
    "multi_value": retrieval.multi_value,
    "multi_query": retrieval.multi_query,
    "variable_tracking": retrieval.variable_tracking,
    "frequent_words": retrieval.frequent_words,
    "associative_recall": recall.associative_recall,
}


GENERATED_TASKS = {**TASKS_BY_DEPTH, **TASKS_BY_LENGTH}
# The probe at planning time is shorter by this share: other samples may take more tokens than it.
PROBE_MARGIN = 0.05


def generated_jobs(cfg: EvaluationConfig, scorer: Scorer, haystack: Haystack) -> list[Job]:
    """One job for each generated task of the config and each length.

    Args:
        cfg: tasks, lengths, depths, samples a cell and seed.
        scorer: runs the model.
        haystack: filler.

    Returns:
        The jobs.

    Raises:
        ConfigError: a length is too short for a task.
    """
    names = [name for name in cfg.tasks if name in GENERATED_TASKS]
    return [_job(cfg, name, length, scorer, haystack) for name in names for length in cfg.lengths]


def make_samples(
    cfg: EvaluationConfig, name: str, length: int, depth: float, count: int, haystack: Haystack
) -> list[Sample]:
    """Samples 0 .. count - 1 of a task.

    A sample's number alone seeds it, so that cells of other lengths and depths hide the same
    needles in the same text: their differences are the model's.
    """
    task = GENERATED_TASKS[name]
    return [
        task(random.Random(f"{cfg.seed} {name} {number}"), haystack, length, depth)
        for number in range(count)
    ]


def _job(cfg: EvaluationConfig, name: str, length: int, scorer: Scorer, haystack: Haystack) -> Job:
    make_samples(cfg, name, int(length * (1 - PROBE_MARGIN)), 0.0, 1, haystack)
    # Tasks without a depth take as many samples, so that both make batches of one shape.
    cells: list[tuple[float | None, int]] = [(None, cfg.samples * len(cfg.depths))]
    if name in TASKS_BY_DEPTH:
        cells = [(depth, cfg.samples) for depth in cfg.depths]

    def run() -> list[Result]:
        samples = [
            sample
            for depth, count in cells
            for sample in make_samples(cfg, name, length, depth or 0.0, count, haystack)
        ]
        scores = iter(score_samples(scorer, samples))
        return [
            summarise(name, length, depth, list(itertools.islice(scores, count)))
            for depth, count in cells
        ]

    return Job(f"{name}, {length} tokens", length * cfg.samples * len(cfg.depths), run)


def key_value_job(path: Path, scorer: Scorer, limit: int | None) -> Job:
    """A job for a published key-value file, or its first `limit` lines.

    Raises:
        DataError: the file or a line cannot be used.
    """
    records = recall.read_key_value_file(path)[:limit]
    samples = [recall.key_value_sample(scorer.tokenizer, record) for record in records]
    sizes = [len(sample.tokens) for sample in samples]

    def run() -> list[Result]:
        return [summarise(path.name, None, None, score_samples(scorer, samples))]

    return Job(path.name, sum(sizes), run)


def summarise(
    task: str, length: int | None, depth: float | None, scores: Sequence[AnswerScore]
) -> AnswerResult:
    """Means over the samples of a cell."""
    exact, share, nats = (float(np.mean(column)) for column in zip(*scores, strict=True))
    return AnswerResult(
        task=task, length=length, depth=depth, samples=len(scores), exact_match=exact,
        exact_match_error=standard_error(exact, len(scores)), answers_right=share, answer_nats=nats,
    )  # fmt: skip
