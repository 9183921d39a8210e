"""The results of a comparison, put together by model: what tables and figures are made of."""

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asa_jax.config import Config, config_from_dict
from asa_jax.decoding.cache_bytes import cache_report
from asa_jax.model.transformer import count_params
from experiments.results import read_grid, read_result
from experiments.stages import run_name

# Of each run: what the report shows as missing. Others are of the first seed alone.
STAGES = ("train", "evaluate", "copying", "retrieval")
FIRST_SEED_STAGES = ("selection", "speed", "decode", "evaluate_long", "choices")
# Two-sided 95% quantiles of Student's t by degrees of freedom; beyond, about that of the last.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
FAR_TOKENS = 1024  # copying counts as far from here on: beyond every window


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of one model and seed, by stage; stages without a result are left out."""

    model: str
    seed: int
    stages: Mapping[str, dict[str, Any]]

    @functools.cached_property
    def config(self) -> Config | None:
        """Of the training; None before it is done."""
        train = self.stages.get("train")
        return config_from_dict(train["config"]) if train else None

    def bits_per_byte(self, stage: str = "evaluate") -> dict[str, float]:
        """Of each part of the validation text."""
        results = self.stages.get(stage, {}).get("perplexity", [])
        return {part["source"]: part["bits_per_byte"] for part in results}

    def far_copies(self) -> float | None:
        """Share of identifiers copied exactly from far back."""
        return _share(
            (group["exact"], group["count"])
            for group in self.stages.get("copying", {}).get("groups", [])
            if group["distance"] and group["distance"][0] >= FAR_TOKENS
        )

    def exact_matches(self) -> dict[str, float]:
        """Of each retrieval task, over all lengths and depths."""
        answers = self.stages.get("retrieval", {}).get("answers", [])
        tasks = dict.fromkeys(answer["task"] for answer in answers)
        cells = {
            task: [(a["exact_match"], a["samples"]) for a in answers if a["task"] == task]
            for task in tasks
        }
        shares = {task: _share(of_task) for task, of_task in cells.items()}
        return {task: share for task, share in shares.items() if share is not None}


def _share(cells: Any) -> float | None:
    cells = list(cells)
    total = sum(count for _, count in cells)
    return sum(share * count for share, count in cells) / total if total else None


class Difference(NamedTuple):
    """A paired difference from the baseline over the seeds that both have.

    Attributes:
        mean: of the differences, model minus baseline.
        spread: their standard deviation; None with one seed.
        seeds: how many.
        verdict: 'lower', 'higher', 'within noise', or 'one seed'.
    """

    mean: float
    spread: float | None
    seeds: int
    verdict: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All results of a grid.

    Attributes:
        grid: fields of the Grid.
        runs: every run of the grid, in its order, with whatever results it has.
    """

    grid: Mapping[str, Any]
    runs: Sequence[Run]

    @property
    def models(self) -> list[str]:
        return list(self.grid["seeds"])

    @property
    def baseline(self) -> str:
        return self.grid["baseline"]

    def of(self, model: str) -> list[Run]:
        """The runs of a model, in the order of seeds."""
        return [run for run in self.runs if run.model == model]

    def first(self, model: str, stage: str) -> dict[str, Any] | None:
        """The result of a stage that is measured for the first seed alone."""
        return self.of(model)[0].stages.get(stage)

    def config(self, model: str) -> Config | None:
        """The configuration of a model that has been trained with any seed."""
        return next((run.config for run in self.of(model) if run.config), None)

    def parts(self) -> list[str]:
        """Parts of the validation text that were measured."""
        return list(dict.fromkeys(part for run in self.runs for part in run.bits_per_byte()))

    def values(self, model: str, part: str) -> dict[int, float]:
        """Bits per byte of a part by seed."""
        runs = {run.seed: run.bits_per_byte() for run in self.of(model)}
        return {seed: values[part] for seed, values in runs.items() if part in values}

    def differences(self, part: str) -> dict[str, Difference]:
        """Of every model that shares a seed with the baseline, in bits per byte of a part."""
        base = self.values(self.baseline, part)
        pairs = {
            model: [value - base[seed] for seed, value in values.items() if seed in base]
            for model in self.models
            if model != self.baseline and (values := self.values(model, part))
        }
        pairs = {model: found for model, found in pairs.items() if found}
        # One seed says nothing of noise; models with several say it for the others.
        repeated = [found for found in pairs.values() if len(found) > 1]
        return {model: _difference(found, repeated) for model, found in pairs.items()}

    def cache_bytes(self, model: str, length: int) -> float | None:
        """Bytes of the cache, a token, of a text of `length` tokens."""
        config = self.config(model)
        if config is None:
            return None
        return cache_report(config.model, [length])[0].whole.allocated.total / length

    def sizes(self) -> dict[str, list[tuple[int, float]]]:
        """Parameters without the embedding and validation loss, by the arm behind the size."""
        points: dict[str, list[tuple[int, float]]] = {}
        for run in self.runs:
            if run.config and "/" in run.model and run.bits_per_byte():
                arm = run.model.partition("/")[2]
                points.setdefault(arm, []).append((_parameters(run.config), self.mixed_loss(run)))
        return points

    def mixed_loss(self, run: Run) -> float:
        """Nats a token, the parts mixed as in training."""
        parts = {p["source"]: p["nats"] / p["tokens"] for p in run.stages["evaluate"]["perplexity"]}
        names = [Path(source).name for source in self.grid["sources"]]
        shares = dict(zip(names, self.grid["weights"], strict=True))
        total = sum(shares[part] for part in parts)
        return sum(shares[part] * nats for part, nats in parts.items()) / total

    def missing(self) -> Iterator[tuple[str, str]]:
        """Runs and stages that the report would show and that have no result."""
        for run in self.runs:
            is_first = run is self.of(run.model)[0]
            for stage in STAGES + (FIRST_SEED_STAGES if is_first else ()):
                if stage not in run.stages and self._is_planned(run.model, stage):
                    yield run_name(run.model, run.seed), stage

    def _is_planned(self, model: str, stage: str) -> bool:
        grid = self.grid
        planned = {
            "retrieval": grid["fine_tuning"] is not None,
            "speed": grid["speed"] is not None,
            "decode": bool(grid["decode_lengths"]),
            "evaluate_long": model in grid["continued"],
            "choices": bool(grid["choices"]),
            "selection": model in grid.get("selecting", ()),
        }
        return planned.get(stage, True)


def _parameters(config: Config) -> int:
    """All but the embedding, which is tied."""
    return count_params(config.model) - config.model.vocab_size * config.model.hidden_size


def _difference(found: Sequence[float], repeated: Sequence[Sequence[float]]) -> Difference:
    mean, count = statistics.fmean(found), len(found)
    spread = statistics.stdev(found) if count > 1 else None
    if spread is not None:
        limit = _quantile(count - 1) * spread / count**0.5
    elif repeated:
        freedom = sum(len(values) - 1 for values in repeated)
        squares = sum((len(values) - 1) * statistics.variance(values) for values in repeated)
        limit = _quantile(freedom) * (squares / freedom) ** 0.5
    else:
        return Difference(mean, None, count, "one seed")
    verdict = "within noise" if abs(mean) <= limit else "lower" if mean < 0 else "higher"
    return Difference(mean, spread, count, verdict)


def _quantile(freedom: int) -> float:
    return _T[min(freedom, len(_T)) - 1]


def load_comparison(output: Path) -> Comparison:
    """Reads all results below a folder of `experiments.compare`.

    Raises:
        DataError: there are none, or a file is damaged.
    """
    grid = read_grid(output)
    names = ("train", *STAGES[1:], *FIRST_SEED_STAGES)
    runs = [
        Run(
            model,
            seed,
            {
                name: result
                for name in names
                if (result := read_result(output, run_name(model, seed), name)) is not None
            },
        )
        for model, seeds in grid["seeds"].items()
        for seed in seeds
    ]
    return Comparison(grid, runs)
