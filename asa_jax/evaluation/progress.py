"""Shows how far an evaluation is: a bar on a terminal, a line for each job elsewhere."""

import datetime
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class EvaluationProgress:
    """Counts scored tokens against those of all jobs; a context manager."""

    def __init__(self, total_tokens: int, console: Console, *, quiet: bool) -> None:
        """Starts at zero.

        Args:
            total_tokens: of all jobs.
            console: where to show it.
            quiet: show nothing, as on processes other than the first.
        """
        self._total, self._done, self._start = max(1, total_tokens), 0, time.monotonic()
        self._console, self._quiet = console, quiet
        self._bar: Progress | None = None
        if console.is_terminal and not quiet:
            self._bar = Progress(
                BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}"),
                TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[job]}"),
                console=console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=self._total, job="", speed="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def begin(self, job: str) -> None:
        """Shows what is measured from now on."""
        if self._bar:
            self._bar.update(self._task, job=job)
        elif not self._quiet:
            self._console.print(f"{self._done / self._total:4.0%}  {self._eta()}  {job}")

    def advance(self, tokens: int) -> None:
        """Counts `tokens` as scored."""
        self._done += tokens
        if self._bar:
            speed = f"{self._done / (time.monotonic() - self._start):,.0f} tokens/s"
            self._bar.update(self._task, completed=self._done, speed=speed)

    def _eta(self) -> str:
        if not self._done:
            return "ETA -:--:--"
        spent = time.monotonic() - self._start
        left = spent * max(0, self._total - self._done) / self._done
        return f"ETA {datetime.timedelta(seconds=round(left))}"
