"""What a comparison has measured: one JSON file for each finished stage of each run.

    OUTPUT/results/grid.json               what is compared
    OUTPUT/results/45m_asa_s0/train.json

They are written whole or not at all, and are all that the report reads.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asa_jax.errors import ConfigError, DataError
from experiments.grid import Grid

RESULTS = "results"
GRID = "grid.json"
# Fields of a grid that say which results there are, and not how each is measured.
WHICH = ("seeds", "baseline", "selecting", "continued", "choices", "by_stage")


def result_path(output: Path, run: str, stage: str) -> Path:
    """Where the result of a stage lies."""
    return output / RESULTS / run / f"{stage}.json"


def write_result(output: Path, run: str, stage: str, content: Mapping[str, Any]) -> None:
    """Writes the result of a stage, which is then finished."""
    _write(result_path(output, run, stage), content)


def drop_result(output: Path, run: str, stage: str) -> bool:
    """Forgets the result of a stage; returns whether there was one."""
    path = result_path(output, run, stage)
    was_there = path.exists()
    path.unlink(missing_ok=True)
    return was_there


def write_grid(output: Path, grid: Grid) -> None:
    """Writes what the results belong to.

    Raises:
        ConfigError: results that are there were measured in another way.
    """
    path = output / RESULTS / GRID
    now = dataclasses.asdict(grid)
    # Fields of grids from before they were there, and those of stages that were not measured, or
    # no longer are, may be anything.
    before = _read(path) if path.exists() and list(path.parent.glob("*/*.json")) else {}
    for name, value in json.loads(json.dumps(now)).items():
        if name not in WHICH and value and before.get(name) and before[name] != value:
            raise ConfigError(
                f"{name} of the grid is not that of the results in {path.parent}; choose another "
                "--output, or move these away"
            )
    _write(path, now)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content) + "\n")
    temporary.replace(path)


def read_result(output: Path, run: str, stage: str) -> dict[str, Any] | None:
    """The result of a stage; None where it is not finished.

    Raises:
        DataError: the file is damaged.
    """
    path = result_path(output, run, stage)
    return _read(path) if path.exists() else None


def read_grid(output: Path) -> dict[str, Any]:
    """The fields of the Grid that the results belong to.

    Raises:
        DataError: there are no results.
    """
    path = output / RESULTS / GRID
    if not path.exists():
        raise DataError(f"{path}: missing; give the --output of an experiments.compare")
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: broken JSON ({error}); delete it to measure again") from None
