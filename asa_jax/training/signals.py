"""Stop signals that wait for the end of a step."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a flag while it is entered; repeated signals change nothing.

    Of many processes jax catches SIGTERM, whichever of them it reaches, and settles a step that all
    of them stop after; Ctrl-C is handed on as SIGTERM there.

    Attributes:
        received: number of the first signal, None before it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._many = jax.process_count() > 1
        self._asked = 0

    @property
    def exit_code(self) -> int:
        """What shells report for a program that a signal ended: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + (self.received or 0)

    def arrived(self) -> bool:
        """Whether to stop now, alike on all processes, each of which asks once a step."""
        # Counted from 1 in every process: a signal before the first step settles on 1.
        self._asked += 1
        if self._many and multihost_utils.reached_preemption_sync_point(self._asked):
            self.received = signal.SIGTERM
        return self.received is not None

    def __enter__(self) -> Self:
        handlers = {signal.SIGINT: _hand_on} if self._many else dict.fromkeys(
            (signal.SIGTERM, signal.SIGINT), self._handle
        )  # fmt: skip
        for number, handler in handlers.items():
            self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            name = signal.Signals(number).name
            print(f"{name}: saving after this step, then stopping", file=sys.stderr, flush=True)


def _hand_on(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
