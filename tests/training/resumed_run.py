"""Trains 20 steps straight, and 10 and then 10 more, for test_faults.py.

    python -m tests.training.resumed_run WORKDIR < config.json

Writes whether losses and all arrays of the last checkpoints are equal to the last bit.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import train
from asa_jax.config import Config, config_from_dict
from asa_jax.launch import Launch
from asa_jax.training.checkpoint import restore_params
from asa_jax.training.metrics import read_metrics
from asa_jax.training.run_directory import Run, open_run, open_sources
from asa_jax.training.step import Trainer


def train_to(config: Config, workdir: Path, steps: int) -> None:
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))
    with open_run(workdir, config, allow_changes=False) as lock:
        run = Run(config, workdir, open_sources(config), False, Launch(), lock)
        assert train.train_run(run) == 0


def main() -> None:
    folder, config = Path(sys.argv[1]), config_from_dict(json.load(sys.stdin))
    straight, resumed = folder / "straight", folder / "resumed"
    # They leave the run as it is, and take longer to compile than the step.
    train.sample = lambda *_: ""
    train.evaluate = lambda *_: {"validation_loss": 0.0, "validation_bits_per_byte": 0.0}
    # The parts differ in their number of steps alone, on which a constant schedule does not depend.
    make_trainer, made = train.make_trainer, []

    def make_once(*args: Any) -> Trainer:
        made.extend([] if made else [make_trainer(*args)])
        return made[0]

    train.make_trainer = make_once
    train_to(config, straight, 20)
    train_to(config, resumed, 10)
    train_to(config, resumed, 20)
    losses = [
        [(x["loss"], x["grad_norm"]) for x in read_metrics(workdir) if "loss" in x]
        for workdir in (straight, resumed)
    ]
    params = [jax.tree.leaves(restore_params(workdir)[1]) for workdir in (straight, resumed)]
    result = {
        "steps": [len(values) for values in losses],
        "losses_equal": losses[0] == losses[1],
        "params_equal": all(map(np.array_equal, *params)),
        "platform": jax.default_backend(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
