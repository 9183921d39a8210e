"""Goodput: the share of wall time that went into training steps (docs/metrics.md)."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

# train.py imports this before jax: a fraction of a second after the process began.
STARTED = time.monotonic()


class Goodput:
    """Adds up the time of the steps that count.

    Productive are the steps whose update was made and that no restart took back, but for the first
    of each process, which waits for compilation. What else passes (starting, compiling, reading and
    writing checkpoints, evaluating, skipped steps, steps done again, no process at all) does not
    count.
    """

    def __init__(
        self,
        lines: Sequence[Mapping[str, Any]],
        start_step: int,
        started: float,
        run_began: float | None = None,
    ) -> None:
        """Goes on from what earlier processes of the run wrote.

        Args:
            lines: metrics.jsonl as the last process left it.
            start_step: the step that was restored; those after it are done again.
            started: time.monotonic() when this process began.
            run_began: time.time() when the first process began, which counts where none of them
                came to write a line; None: it is not known.
        """
        timed = [line for line in lines if "productive_seconds" in line]
        kept = [line["productive_seconds"] for line in timed if line["step"] <= start_step]
        self._started = started
        self._run_seconds_before = self._productive_before = self._productive = 0.0
        began = time.time() - self._seconds()
        # A clock that was set back between two processes adds nothing.
        if timed:
            pause = max(0.0, began - timed[-1]["time"])
            self._run_seconds_before = timed[-1]["run_seconds"] + pause
            self._productive_before = kept[-1] if kept else 0.0
        elif run_began is not None:
            self._run_seconds_before = max(0.0, began - run_began)
        self._steps = 0

    def add(self, seconds: float, *, updated: bool) -> None:
        """Counts a step.

        Args:
            seconds: how long it took.
            updated: whether its update was made.
        """
        self._steps += 1
        if self._steps > 1 and updated:
            self._productive += seconds

    def values(self) -> dict[str, float]:
        """Seconds of the run and those that count; the shares in this process and in the run."""
        run_seconds = self._run_seconds_before + self._seconds()
        productive = self._productive_before + self._productive
        return {
            "run_seconds": run_seconds,
            "productive_seconds": productive,
            "goodput": self._productive / self._seconds(),
            "run_goodput": productive / run_seconds,
        }

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)
