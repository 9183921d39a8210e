"""The stages of a comparison: each is one command of this project and the result it leaves."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from asa_jax.data.shards import MANIFEST
from asa_jax.training.compare import summarise
from asa_jax.training.metrics import read_metrics
from asa_jax.training.run_directory import CHECKPOINTS, CONFIG
from experiments.grid import Grid, Settings
from experiments.results import read_result

SHARED = "shared"  # the run whose stages serve all others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A piece of work that is done or not.

    Attributes:
        run: whose it is.
        name: of the stage.
        needs: results that must be there first, as pairs of run and stage.
        checkpoint: run directory whose parameters it reads; they are not part of any result.
        command: arguments of Python, made when the stage begins.
        collect: reads what the command left, given its output.
        alone: it is timed, so nothing else may use its GPU.
        workdir: run directory of a training, for progress.
        leaves: what stages which need this one read; made again if it is gone and one still does.
    """

    run: str
    name: str
    needs: tuple[tuple[str, str], ...] = ()
    checkpoint: Path | None = None
    command: Callable[[], list[str]]
    collect: Callable[[str], dict[str, Any]]
    alone: bool = False
    workdir: Path | None = None
    leaves: Path | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.run, self.name


def run_name(model: str, seed: int) -> str:
    """Name of the run of a model and a seed, as results have it."""
    return f"{model.replace('/', '_')}_s{seed}"


def make_stages(
    grid: Grid,
    output: Path,
    models: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Stage]:
    """All stages of a grid in the order of work.

    Args:
        grid: what is compared.
        output: folder of runs and results.
        models: the ones to work on; None: all.
        seeds: of them; None: all. The sweep of a model is there with any of its seeds.

    Returns:
        Stages; each comes after those that it needs.
    """
    wanted = list(grid.seeds) if models is None else models
    runs = [_RunStages(grid, output, model, seed) for model in wanted for seed in grid.seeds[model]]
    # First seeds of all models before the second seeds of any.
    runs.sort(key=lambda run: grid.seeds[run.model].index(run.seed))
    lists = [run.stages() if seeds is None or run.seed in seeds else run.sweep() for run in runs]
    stages = [stage for of_run in lists for stage in of_run]
    if grid.by_stage:
        order = list(dict.fromkeys(stage.name for stage in stages))
        stages.sort(key=lambda stage: order.index(stage.name))
    shared = _shared_stages(grid, output)
    needed = {stage.key for stage in shared}
    first = next((i for i, stage in enumerate(stages) if needed & set(stage.needs)), 0)
    return [*stages[:first], *shared, *stages[first:]]


def learning_rate(grid: Grid, output: Path, model: str) -> float:
    """The rate of the sweep with the least validation loss; the only one where there is no sweep.

    Every result of the sweep must be there.
    """
    if len(grid.learning_rates) == 1:
        return grid.learning_rates[0]
    losses = {}
    for rate in grid.learning_rates:
        result = read_result(output, run_name(model, grid.seeds[model][0]), _sweep_name(rate))
        assert result is not None
        losses[rate] = result["validation_loss"]
    return min(losses, key=lambda rate: losses[rate])


def _sweep_name(rate: float) -> str:
    return f"sweep_{rate:g}"


def _shared_stages(grid: Grid, output: Path) -> list[Stage]:
    if grid.fine_tuning is None:
        return []
    folder = _tasks_folder(output)
    command = [
        "-m", "experiments.tasks", f"--tokens={grid.sources[0]}", f"--output={folder}",
        *_flags(grid.tasks),
    ]  # fmt: skip

    def collect(said: str) -> dict[str, Any]:
        return {"said": said.strip()}

    return [
        Stage(
            run=SHARED, name="tasks", command=lambda: command, collect=collect,
            leaves=folder / MANIFEST,
        )
    ]  # fmt: skip


def _tasks_folder(output: Path) -> Path:
    return output / "tasks"


def _flags(settings: Settings) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def _config_flags(settings: Settings) -> list[str]:
    return _flags({f"config.{name}": value for name, value in settings.items()})


def _json_lines(said: str) -> dict[str, Any]:
    """Merges the lines of JSON that a command printed."""
    return {name: value for line in said.splitlines() for name, value in json.loads(line).items()}


@dataclasses.dataclass(frozen=True)
class _RunStages:
    """Makes the stages of one model and seed."""

    grid: Grid
    output: Path
    model: str
    seed: int

    @property
    def name(self) -> str:
        return run_name(self.model, self.seed)

    @property
    def is_first(self) -> bool:
        return self.seed == self.grid.seeds[self.model][0]

    def sweep(self) -> Iterator[Stage]:
        if self.is_first and len(self.grid.learning_rates) > 1:
            yield from map(self._sweep, self.grid.learning_rates)

    def stages(self) -> Iterator[Stage]:
        grid, is_first = self.grid, self.is_first
        yield from self.sweep()
        yield self._train()
        yield self._eval("evaluate", "train", self._workdir(), grid.evaluation)
        yield self._script("copying", grid.copying)
        if is_first and self.model in grid.selecting:
            yield self._script("selection", grid.selection)
        if is_first and grid.choices:
            files = [f"--multiple_choice={file}" for file in grid.choices]
            yield self._eval("choices", "train", self._workdir(), {"tasks": ""}, files)
        if is_first and grid.speed is not None:
            yield self._speed(grid.speed)
        if is_first and self.model in grid.continued and grid.continuation:
            yield self._second("continue", grid.continuation.settings)
            yield self._eval(
                "evaluate_long", "continue", self._workdir("continue"), grid.long_evaluation,
                is_last=True,
            )  # fmt: skip
        if grid.fine_tuning:
            tasks = {"data.sources": (str(_tasks_folder(self.output)),), "data.weights": (1.0,)}
            yield self._second("fine_tune", tasks | dict(grid.fine_tuning.settings), shared="tasks")
            yield self._eval(
                "retrieval", "fine_tune", self._workdir("fine_tune"), grid.retrieval, is_last=True
            )
        if is_first and grid.decode_lengths:
            lengths = ",".join(map(str, grid.decode_lengths))
            yield self._timed(
                "decode", ["-m", "experiments.decode_time", f"--lengths={lengths}"], self._config
            )

    def _workdir(self, stage: str = "train") -> Path:
        return self.output / "runs" / self.name / stage

    def _config(self, *more: Settings, rate: float | None = None) -> list[str]:
        """Flags of the configuration; later settings take the place of earlier ones."""
        grid = self.grid
        settings = {
            "data.sources": grid.sources, "data.weights": grid.weights,
            "data.seed": self.seed, "training.seed": self.seed,
        }  # fmt: skip
        settings |= grid.settings
        settings |= grid.model_settings.get(self.model, {})
        if rate is not None:
            settings["optimizer.learning_rate"] = rate
        for changes in more:
            settings |= changes
        return [f"--config={grid.config.format(model=self.model)}", *_config_flags(settings)]

    def _training(
        self, stage: str, config: Callable[[], list[str]], keep: bool = True, **fields: Any
    ) -> Stage:
        """A run of train.py; `keep`: other stages read its parameters."""
        workdir = self._workdir(stage)

        def command() -> list[str]:
            _drop_unevaluated(workdir)
            return ["train.py", f"--workdir={workdir}", *config()]

        def collect(_: str) -> dict[str, Any]:
            result = summarise(workdir)
            result["config"] = json.loads((workdir / CONFIG).read_text())
            if not keep:
                _drop_checkpoints(workdir)
            return result

        return Stage(
            run=self.name, name=stage, workdir=workdir, collect=collect,
            command=command, leaves=workdir / CHECKPOINTS if keep else None, **fields,
        )  # fmt: skip

    def _sweep(self, rate: float) -> Stage:
        settings = self.grid.sweep.settings
        return self._training(
            _sweep_name(rate), lambda: self._config(settings, rate=rate), keep=False
        )

    def _rates(self) -> tuple[tuple[str, str], ...]:
        """The results that choose the learning rate."""
        rates = self.grid.learning_rates
        first = run_name(self.model, self.grid.seeds[self.model][0])
        return tuple((first, _sweep_name(rate)) for rate in rates) if len(rates) > 1 else ()

    def _chosen_config(self, settings: Settings) -> list[str]:
        return self._config(settings, rate=learning_rate(self.grid, self.output, self.model))

    def _train(self) -> Stage:
        return self._training("train", lambda: self._chosen_config({}), needs=self._rates())

    def _speed(self, settings: Settings) -> Stage:
        """At the rate of the training, whose compiled program it then finds."""
        return self._timed(
            "speed", ["-m", "asa_jax.training.speed"], lambda: self._chosen_config(settings),
            needs=self._rates(),
        )  # fmt: skip

    def _second(self, stage: str, settings: Settings, shared: str | None = None) -> Stage:
        """A training that goes on from the parameters of the first one."""
        trained = self._workdir()
        needs = [(self.name, "train")] + ([(SHARED, shared)] if shared else [])
        return self._training(
            stage, lambda: self._config({"init_from": str(trained)}, settings),
            needs=tuple(needs), checkpoint=trained,
        )  # fmt: skip

    def _eval(
        self,
        stage: str,
        trained: str,
        workdir: Path,
        flags: Settings,
        more_flags: Sequence[str] = (),
        *,
        is_last: bool = False,
    ) -> Stage:
        """A run of eval.py; `is_last`: nothing else needs the parameters that it reads."""
        folder = self.output / "runs" / self.name / f"{stage}_report"

        def collect(_: str) -> dict[str, Any]:
            report = json.loads((folder / "results.json").read_text())
            if is_last:
                _drop_checkpoints(workdir)
            return {name: value for name, value in report.items() if name != "config"}

        command = [
            "eval.py", f"--workdir={workdir}", f"--output={folder}", *_flags(flags), *more_flags,
        ]  # fmt: skip
        return Stage(
            run=self.name, name=stage, needs=((self.name, trained),), checkpoint=workdir,
            command=lambda: command, collect=collect,
        )  # fmt: skip

    def _script(self, stage: str, flags: Settings) -> Stage:
        """A measurement of the trained parameters, by the module of `experiments` of its name."""
        workdir = self._workdir()
        file = self.output / "runs" / self.name / f"{stage}.json"
        command = [
            "-m", f"experiments.{stage}", f"--workdir={workdir}", f"--output={file}",
            *_flags(flags),
        ]  # fmt: skip
        return Stage(
            run=self.name, name=stage, needs=((self.name, "train"),), checkpoint=workdir,
            command=lambda: command, collect=lambda _: json.loads(file.read_text()),
        )  # fmt: skip

    def _timed(
        self, stage: str, command: list[str], config: Callable[[], list[str]], **fields: Any
    ) -> Stage:
        return Stage(
            run=self.name, name=stage, collect=_json_lines, alone=True,
            command=lambda: [*command, *config()], **fields,
        )  # fmt: skip


def _drop_unevaluated(workdir: Path) -> None:
    """Drops the last checkpoint of a run that was killed before its last evaluation.

    The run would be finished without one; so the steps since the checkpoint before are done again.
    """
    if not (workdir / CONFIG).exists():
        return
    last = json.loads((workdir / CONFIG).read_text())["training"]["steps"]
    evaluated = {line["step"] for line in read_metrics(workdir) if "validation_loss" in line}
    if last not in evaluated:
        shutil.rmtree(workdir / CHECKPOINTS / str(last), ignore_errors=True)


def _drop_checkpoints(workdir: Path) -> None:
    shutil.rmtree(workdir / CHECKPOINTS, ignore_errors=True)
