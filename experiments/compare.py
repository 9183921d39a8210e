"""Trains and measures the models of a grid; the same command again goes on from where it stopped.

    python -m experiments.compare --grid=experiments/grids/main.py --output=runs/comparison
    python -m experiments.compare --grid=experiments/grids/main.py --gpu=0,1,2,3 \\
        --arms=45m/asa,45m/full --seeds=0 --time_limit_s=3000

Runs one process a GPU. `python -m experiments.report OUTPUT` makes tables and figures of what is
there; docs/comparison.md says what is measured.

Exit codes: 0 everything is done, or the time is up; 1 a stage failed, and others went on; 2 a flag
or the grid is wrong; 130 or 143 Ctrl-C or SIGTERM stopped it, after trainers have saved.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Of the stages; this process reads shapes alone and must leave the GPUs to them.
    ENVIRONMENT = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"

from asa_jax.data.shard_writer import locked
from asa_jax.errors import ConfigError, exit_on_user_error
from asa_jax.flags import PROJECT
from asa_jax.run_flags import check_file
from experiments.grid import Grid, load_grid
from experiments.results import write_grid
from experiments.runner import Runner, make_slots
from experiments.stages import make_stages


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare")
    parser.add_argument("--grid", type=Path, required=True, help="a file that sets GRID")
    parser.add_argument("--output", type=Path, help="default: runs/ and the name of the grid")
    parser.add_argument("--arms", help="models of the grid to work on, with commas between")
    parser.add_argument("--seeds", help="of those models to work on, with commas between")
    parser.add_argument("--gpu", default="", help="GPUs, with commas between; twice: two at a time")
    parser.add_argument("--choices", default="", help="multiple-choice files, commas between")
    parser.add_argument("--time_limit_s", type=float, help="stop after so many seconds")
    options = parser.parse_args(arguments)
    options.grid = options.grid.resolve()
    options.output = (options.output or Path("runs") / options.grid.stem).resolve()
    return options


def run(options: argparse.Namespace, environment: dict[str, str]) -> int:
    """Runs what is left of the grid; returns the exit code."""
    output = options.output
    if output.is_relative_to(PROJECT):
        # The results name paths: those within the project shall mean something elsewhere.
        output = output.relative_to(PROJECT)
    os.chdir(PROJECT)
    deadline = None
    if options.time_limit_s is not None:
        if options.time_limit_s <= 0:
            raise ConfigError(f"--time_limit_s={options.time_limit_s:g}: must be positive")
        deadline = time.monotonic() + options.time_limit_s
    grid = _read_grid(options)
    models = options.arms.split(",") if options.arms else None
    for model in models or ():
        if model not in grid.seeds:
            raise ConfigError(f"--arms: '{model}' must be one of {', '.join(grid.seeds)}")
    seeds = _read_seeds(options.seeds, grid)
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(output.absolute() / "compiled"))
    slots = make_slots([gpu for gpu in options.gpu.split(",") if gpu])
    with locked(output):
        write_grid(output, grid)
        stages = make_stages(grid, output, models, seeds)
        return Runner(stages, output, slots, environment, deadline).run()


def _read_grid(options: argparse.Namespace) -> Grid:
    grid = load_grid(options.grid)
    if not options.choices:
        return grid
    files = tuple(options.choices.split(","))
    for file in files:
        check_file("choices", Path(file))
    return dataclasses.replace(grid, choices=files)


def _read_seeds(text: str | None, grid: Grid) -> list[int] | None:
    if not text:
        return None
    known = {str(seed): seed for seeds in grid.seeds.values() for seed in seeds}
    for name in text.split(","):
        if name not in known:
            raise ConfigError(f"--seeds: '{name}' must be one of {', '.join(known)}")
    return [known[name] for name in text.split(",")]


def main(environment: dict[str, str]) -> None:
    """Runs the command."""
    with exit_on_user_error():
        sys.exit(run(parse(), environment))


if __name__ == "__main__":
    main(ENVIRONMENT)
