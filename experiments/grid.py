"""A grid: which models of a comparison are trained and measured, and how. Plain Python files."""

import dataclasses
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asa_jax.errors import ConfigError

# Fields of the configuration, 'training.steps', or flags of eval.py, 'lengths', with their values.
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A training run that starts from random parameters or from another run.

    Attributes:
        settings: fields of the configuration in which it differs.
    """

    settings: Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What is trained and measured; see `experiments/grids/main.py`.

    Attributes:
        config: what `train.py --config` takes, with `{model}` for the name of a model.
        seeds: of each model, in the order of work; a seed sets parameters and order of data.
        baseline: the model that the others are compared with.
        sources: token folders; validation loss is reported for each.
        weights: of the sources, shares of tokens.
        settings: further fields of the configuration that all runs share.
        model_settings: further fields by model.
        learning_rates: of which each model takes the one of the least validation loss.
        sweep: the short runs that find it; unused where there is one rate.
        evaluation: flags of eval.py after training: validation loss by part and position.
        choices: files of multiple-choice examples for eval.py, first seed of each model.
        copying: flags of `experiments.copying`.
        selection: flags of `experiments.selection`, for the models in `selecting`, first seed.
        selecting: models whose layers select blocks.
        fine_tuning: on synthetic tasks; None: retrieval is not measured.
        tasks: flags of `experiments.tasks`, which makes their training data.
        retrieval: flags of eval.py after fine-tuning.
        continuation: at a longer context, of the models in `continued`, first seed.
        continued: models.
        long_evaluation: flags of eval.py after the continuation.
        speed: fields of the configuration with which training speed is measured; None: it is not.
        decode_lengths: contexts in tokens at which decoding is timed; (): it is not.
        by_stage: all models go through a stage before the next one begins, instead of each through
            all of its stages: for a grid that may be cut short.
    """

    config: str
    seeds: Mapping[str, tuple[int, ...]]
    baseline: str
    sources: tuple[str, ...]
    weights: tuple[float, ...]
    settings: Settings = dataclasses.field(default_factory=dict)
    model_settings: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    learning_rates: tuple[float, ...]
    sweep: Training = Training(settings={})
    evaluation: Settings
    copying: Settings
    choices: tuple[str, ...] = ()
    selection: Settings = dataclasses.field(default_factory=dict)
    selecting: tuple[str, ...] = ()
    fine_tuning: Training | None = None
    tasks: Settings = dataclasses.field(default_factory=dict)
    retrieval: Settings = dataclasses.field(default_factory=dict)
    continuation: Training | None = None
    continued: tuple[str, ...] = ()
    long_evaluation: Settings = dataclasses.field(default_factory=dict)
    speed: Settings | None = None
    decode_lengths: tuple[int, ...] = ()
    by_stage: bool = False

    def __post_init__(self) -> None:
        if not self.learning_rates:
            raise ConfigError("learning_rates: must hold at least one rate")
        named = {self.baseline: "baseline"} | {model: "continued" for model in self.continued}
        named |= {model: "selecting" for model in self.selecting}
        named |= {model: "model_settings" for model in self.model_settings}
        for model, field in named.items():
            if model not in self.seeds:
                raise ConfigError(f"{field}: '{model}' is not in seeds")
        for model, seeds in self.seeds.items():
            if not seeds or len(set(seeds)) < len(seeds):
                raise ConfigError(f"seeds: of '{model}' must be different, and at least one")


def load_grid(path: Path) -> Grid:
    """Runs a grid file, which must set GRID.

    Raises:
        ConfigError: there is no such file, or it makes no grid.
    """
    if not path.is_file():
        raise ConfigError(f"--grid={path}: no such file")
    try:
        grid = runpy.run_path(str(path)).get("GRID")
    except Exception as error:  # the file runs as code
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"--grid={path}: {kind}{error}") from None
    if not isinstance(grid, Grid):
        raise ConfigError(f"--grid={path}: does not set GRID to a Grid")
    return grid
