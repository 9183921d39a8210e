"""lm-eval's model interface over scorer and generator, and the JSONL sets as lm-eval tasks.

Needs the extra `eval`; nothing else in the package imports this module at its top. Tasks are
written for one evaluation to a temporary folder, from files that were read and checked here: no
task of lm-eval's own, nothing from a network, no code in a task.
"""

import itertools
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Read when datasets and tqdm are imported: no network, no bars across ours.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

from asa_jax.decoding.generate import Generator
from asa_jax.decoding.settings import Sampling
from asa_jax.errors import DataError
from asa_jax.evaluation.multiple_choice import (
    Example,
    encode_requests,
    read_examples,
    score_encoded,
)
from asa_jax.evaluation.results import HarnessResult, Job, Result, standard_error
from asa_jax.evaluation.scorer import Scorer

# Prompts that are continued at a time, and tokens where a task does not say how many.
GENERATION_ROWS = 16
GENERATION_TOKENS = 256


class HarnessModel(LM):
    """A model as lm-eval sees it."""

    def __init__(self, scorer: Scorer, generator: Generator, window_tokens: int) -> None:
        """Wraps what runs the model.

        Args:
            scorer: for log-likelihoods.
            generator: for continuations.
            window_tokens: most tokens that `loglikelihood_rolling` predicts from one context.
        """
        super().__init__()
        self._scorer = scorer
        self._generator = generator
        self._window_tokens = window_tokens

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each (context, continuation), and whether it is greedy."""
        pairs = [self._encode_pair(*request.args) for request in requests]
        return [(s.log_likelihood, s.greedy) for s in score_encoded(self._scorer, pairs)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood in nats of each (text,), from windows that predict each token once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self._scorer.tokenizer.encode(request.args[0])
            for context, predicted in get_rolling_token_windows(
                tokens, self._generator.encode_prompt("")[-1], self._window_tokens, 1
            ):
                window = np.array([*context, predicted[-1]], np.int32)
                windows.append((window, len(window) - len(predicted)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, score_encoded(self._scorer, windows), strict=True):
            totals[owner] += score.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continues each (prompt, settings) up to the first of the settings' stops."""
        texts: list[str] = []
        for settings, group in itertools.groupby(requests, lambda request: request.args[1]):
            prompts = [request.args[0] for request in group]
            for first in range(0, len(prompts), GENERATION_ROWS):
                texts += self._continue(prompts[first : first + GENERATION_ROWS], settings)
        return texts

    def _continue(self, prompts: list[str], settings: dict[str, Any]) -> list[str]:
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        temperature = float(settings.get("temperature", 1)) if settings.get("do_sample") else 0.0
        texts = [""] * len(prompts)
        for parts in self._generator.stream(
            prompts,
            max_tokens=int(settings.get("max_gen_toks", GENERATION_TOKENS)),
            sampling=Sampling(temperature=temperature, top_p=float(settings.get("top_p", 1))),
        ):
            texts = [text + part for text, part in zip(texts, parts, strict=True)]
            if all(cut(text, stops) != text for text in texts):
                break
        return [cut(text, stops) for text in texts]

    def _encode_pair(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        # Tokens start with their space, so spaces at the end of a context go to the continuation.
        kept = context.rstrip(" ")
        before = self._generator.encode_prompt(kept)
        after = self._scorer.tokenizer.encode(context[len(kept) :] + continuation)
        return np.array([*before, *after], np.int32), len(before)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops` in it."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def harness_job(paths: Sequence[Path], scorer: Scorer, model: LM, limit: int | None) -> Job:
    """A job for JSONL files in the formats of `multiple_choice`, or their first `limit` examples.

    Args:
        paths: the files.
        scorer: of the model, to count the tokens.
        model: what lm-eval asks.
        limit: examples of each file; None: all.

    Raises:
        DataError: a file or a line cannot be used.
    """
    sets = {}
    for path in paths:
        name = re.sub(r"\W", "_", path.name.partition(".")[0])
        if name in sets:
            raise DataError(f"{path}: another file gives a task of the same name, {name}")
        sets[name] = read_examples(path)[:limit]
    requests = [r for examples in sets.values() for example in examples for r in example.requests]
    tokens = sum(len(ids) - 1 for ids, _ in encode_requests(scorer.tokenizer, requests))

    def run() -> list[Result]:
        return evaluate_sets(model, sets)

    return Job("lm-eval", tokens, run)


def evaluate_sets(model: LM, sets: dict[str, list[Example]]) -> list[Result]:
    """Runs lm-eval's evaluator on sets of examples.

    Args:
        model: an lm-eval model.
        sets: examples by the name of their task.

    Returns:
        Each metric of each task.
    """
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        for name, examples in sets.items():
            write_task(Path(folder), name, examples)
        report = lm_eval.simple_evaluate(
            model=model,
            tasks=list(sets),
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            # Its bootstrap forks, which a process with jax in it must not.
            bootstrap_iters=0,
            log_samples=False,
        )
    return [
        result
        for name, examples in sets.items()
        for result in _metrics(name, report["results"][name], len(examples))
    ]


def write_task(folder: Path, name: str, examples: Sequence[Example]) -> None:
    """Writes examples of one kind as a data file and a task that reads it by its absolute path.

    Raises:
        DataError: the examples are of different kinds.
    """
    kinds = {_kind(example) for example in examples}
    if len(kinds) > 1:
        raise DataError(f"{name}: its lines are of different kinds; give each kind its own file")
    data = folder.resolve() / f"{name}.jsonl"
    data.write_text("".join(json.dumps(_row(example)) + "\n" for example in examples))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "target_delimiter": " ",
        **_TASKS[kinds.pop()],
    }
    # JSON is YAML, and cannot spell the tags by which a task would run code.
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


# How lm-eval reads a row of each kind. A plain name is that field.
_TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [_mean("acc"), _mean("acc_norm")],
    },
    "contexts": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "contexts",
        "doc_to_target": "continuation",
        "metric_list": [_mean("acc")],
    },
    "continuation": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "last_words",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            _mean("acc"),
        ],
    },
}


def _kind(example: Example) -> str:
    if example.gold is None:
        return "continuation"
    same = len({request.context for request in example.requests}) == 1
    return "choices" if same else "contexts"


def _row(example: Example) -> dict[str, Any]:
    """The fields of an example that the tasks name, without spaces where they meet."""
    contexts = [request.context.rstrip() for request in example.requests]
    continuations = [request.continuation.strip() for request in example.requests]
    return {
        "context": contexts[0],
        "contexts": contexts,
        "continuation": continuations[0],
        # lm-eval puts its delimiter before choices only.
        "last_words": f" {continuations[0]}",
        "choices": continuations,
        "gold": example.gold,
    }


def _metrics(name: str, values: dict[str, Any], count: int) -> list[Result]:
    """Picks the metrics, which lm-eval names 'acc,none' with the name of a filter behind."""
    results: list[Result] = []
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr"):
            error = standard_error(value, count) if metric.startswith("acc") else None
            results.append(HarnessResult(task=name, metric=metric, value=value, error=error))
    return results
