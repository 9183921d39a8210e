"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

import datetime
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressDisplay:
    """Shows step, loss, bits per byte, tokens a second and the time left; a context manager.

    A terminal or pipe that goes away does not end the run.
    """

    def __init__(self, start_step: int, steps: int, every: int, *, quiet: bool = False) -> None:
        """Starts at `start_step`.

        Args:
            start_step: steps done before.
            steps: steps of the whole run.
            every: steps between plain lines.
            quiet: show nothing, as on processes other than the first.
        """
        self._steps, self._every, self._quiet = steps, every, quiet
        console = Console()
        self._bar: Progress | None = None
        if console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(None),
                TextColumn("{task.fields[numbers]}"), TextColumn("ETA"), TimeRemainingColumn(),
                console=console,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=steps, completed=start_step, numbers="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, values: Mapping[str, float | None], seconds_left: float) -> None:
        """Shows the numbers of a step.

        Args:
            step: steps done.
            values: metrics of the step.
            seconds_left: estimate for the rest of the run.
        """
        numbers = _numbers(values)
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self._every == 0 or step == self._steps:
            left = datetime.timedelta(seconds=round(seconds_left))
            self.print(f"step {step:>{len(str(self._steps))}}/{self._steps}  {numbers}  ETA {left}")

    def print(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._quiet:
            return
        try:
            if self._bar:
                self._bar.console.print(line, markup=False, highlight=False)
            else:
                print(line, flush=True)
        except BrokenPipeError:
            self._quiet = True  # nobody reads any more; training goes on


def _numbers(values: Mapping[str, float | None]) -> str:
    shown = (
        ("loss {:.4f}", "loss"),
        ("bits/byte {:.3f}", "bits_per_byte"),
        ("{:,.0f} tokens/s", "tokens_per_second"),
        ("MFU {:.1%}", "mfu"),
    )
    parts = [text.format(values[name]) for text, name in shown if values.get(name) is not None]
    return "  ".join(parts)
