"""Training steps on real batches, timed as a whole."""

import time
from typing import NamedTuple

import jax

from asa_jax.training.feed import Feed
from asa_jax.training.step import Trainer, TrainState


class StepTimes(NamedTuple):
    """What steps took, each on average, in seconds.

    Attributes:
        total: from the first batch asked for to the last result.
        data_wait: of `total`, until the batch was there.
        dispatch: of `total`, until the host could go on; the device may be at work by then.
        loss: of the last step, nats a token.
    """

    total: float
    data_wait: float
    dispatch: float
    loss: float


def run_steps(
    trainer: Trainer, feed: Feed, state: TrainState, steps: int
) -> tuple[TrainState, StepTimes]:
    """Trains some steps; nothing is left to be done on the device when it returns.

    As in a run, the metrics of a step are waited for when the next one is queued. Intervals between
    those moments are no step times: the host may be late for one and early for the next.
    """
    start, waited, dispatched, pending = time.perf_counter(), 0.0, 0.0, None
    for _ in range(steps):
        batch, wait = feed.next()
        queued = time.perf_counter()
        state, metrics = trainer.step(state, batch, trainer.schedule)
        dispatched += time.perf_counter() - queued
        waited += wait
        jax.block_until_ready(pending)
        pending = metrics
    jax.block_until_ready(state)
    total = time.perf_counter() - start
    times = StepTimes(total / steps, waited / steps, dispatched / steps, float(metrics["loss"]))
    return state, times
