"""What the tests of train.py as a command share."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asa_jax.training.checkpoint import restore_params
from asa_jax.training.metrics import read_metrics

STEPS = 60


def losses(workdir: Path) -> list[tuple]:
    """The numbers of every step and evaluation that must not depend on interruptions."""
    names = ("step", "loss", "grad_norm", "learning_rate", "validation_loss")
    return [tuple(line.get(name) for name in names) for line in read_metrics(workdir)]


def final_params(workdir: Path) -> Any:
    _, params, step = restore_params(workdir)
    assert step == STEPS
    return params


def wait_for_step(workdir: Path, step: int) -> None:
    """Returns when the metrics of a step, or of a later one, are written."""
    wait_for(lambda: any(line["step"] >= step for line in read_metrics(workdir)))


def wait_for(condition: Callable[[], Any], seconds: float = 120, every: float = 0.01) -> None:
    """Returns when `condition()` holds; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(every)
