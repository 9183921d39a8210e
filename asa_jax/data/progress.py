"""Shows how far a long job is: a bar on a terminal, a line every ten seconds elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Report(Protocol):
    """Called with what is done."""

    def __call__(self, done_bytes: int, tokens: int) -> None:
        """Shows `done_bytes` of the input and the tokens made of it."""


@contextlib.contextmanager
def show_progress(total_bytes: int) -> Iterator[Report]:
    """Shows progress on stderr while the block runs.

    Args:
        total_bytes: size of the input.
    """
    if not sys.stderr.isatty():
        yield _Lines(total_bytes)
        return
    columns = (BarColumn(), DownloadColumn(), TextColumn("{task.fields[tokens]:,} tokens"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total_bytes, tokens=0)
        yield lambda done_bytes, tokens: bar.update(task, completed=done_bytes, tokens=tokens)


class _Lines:
    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = max(1, total_bytes)
        self._last = time.monotonic()

    def __call__(self, done_bytes: int, tokens: int) -> None:
        if time.monotonic() - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = time.monotonic()
        share = done_bytes / self._total_bytes
        line = f"{share:4.0%} of {self._total_bytes / 1e6:,.1f} MB, {tokens:,} tokens"
        print(line, file=sys.stderr, flush=True)
