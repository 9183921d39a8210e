"""Shows how far long prompts are read: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows progress on stderr while the block runs.

    Args:
        what: is counted.

    Returns:
        Gives a function to call with what is done and with the total; it shows nothing while all is
        done at its first call.
    """
    if not sys.stderr.isatty():
        yield _Lines(what)
        return
    bar = _Bar(what)
    try:
        yield bar
    finally:
        bar.stop()


class _Bar:
    def __init__(self, what: str) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._task is None and done < total:
            self._task = self._progress.add_task("", total=total)
            self._progress.start()
        if self._task is not None:
            self._progress.update(self._task, completed=done)

    def stop(self) -> None:
        if self._task is not None:
            self._progress.stop()


class _Lines:
    def __init__(self, what: str) -> None:
        self._what, self._last = what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"{done:,} of {total:,} {self._what}", file=sys.stderr, flush=True)
