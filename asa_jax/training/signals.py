"""Stop signals that wait for the end of a step."""

import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a flag while it is entered; repeated signals change nothing.

    Attributes:
        received: number of the first signal, None before it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """What shells report for a program that a signal ended: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + (self.received or 0)

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
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
