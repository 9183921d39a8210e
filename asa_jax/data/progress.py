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

    def __call__(self, done_bytes: int, made: int) -> None:
        """Shows `done_bytes` of the input and how much was `made` of it."""


@contextlib.contextmanager
def show_progress(total_bytes: int, product: str) -> Iterator[Report]:
    """Shows progress on stderr while the block runs.

    Args:
        total_bytes: size of the input.
        product: what is made of it, such as 'tokens'.
    """
    if not sys.stderr.isatty():
        yield _Lines(total_bytes, product)
        return
    columns = (BarColumn(), DownloadColumn(), TextColumn(f"{{task.fields[made]:,}} {product}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total_bytes, made=0)
        yield lambda done_bytes, made: bar.update(task, completed=done_bytes, made=made)


class _Lines:
    def __init__(self, total_bytes: int, product: str) -> None:
        self._total_bytes = max(1, total_bytes)
        self._product = product
        self._start = self._last = time.monotonic()
        self._first_bytes: int | None = None  # a job that goes on does not start at 0

    def __call__(self, done_bytes: int, made: int) -> None:
        if self._first_bytes is None:
            self._first_bytes = done_bytes
            self._start = time.monotonic()
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        share = done_bytes / self._total_bytes
        line = f"{share:4.0%} of {self._total_bytes / 1e6:,.1f} MB, {made:,} {self._product}"
        print(line + self._time_left(done_bytes, now), file=sys.stderr, flush=True)

    def _time_left(self, done_bytes: int, now: float) -> str:
        done_now = done_bytes - (self._first_bytes or 0)
        if done_now <= 0:
            return ""
        seconds = (now - self._start) * (self._total_bytes - done_bytes) / done_now
        left = f"{seconds:,.0f} s" if seconds < 90 else f"{seconds / 60:,.0f} min"
        return f", about {left} left"
