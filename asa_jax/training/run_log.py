"""From metrics on the device to numbers in files and on the screen, one step late.

The metrics of a step are fetched when the next one has been dispatched, so that the device never
waits for the host, and the host is never more than one step ahead.
"""

import datetime
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

from asa_jax.config import Config
from asa_jax.errors import UserError
from asa_jax.training.flops import flops_per_token, peak_flops
from asa_jax.training.goodput import Goodput
from asa_jax.training.metrics import MetricsWriter, read_metrics
from asa_jax.training.progress import ProgressDisplay
from asa_jax.training.run_directory import note_run, run_notes
from asa_jax.training.wandb_log import WandbWriter


class RunLog:
    """Completes steps: waits for their metrics, derives rates, writes and shows them."""

    def __init__(
        self, workdir: Path, config: Config, num_params: int, start_step: int, started: float
    ) -> None:
        """Opens the files; only the first process writes and shows.

        Args:
            workdir: the run directory.
            config: the run.
            num_params: parameters of the model, for the utilisation.
            start_step: steps done before.
            started: time.monotonic() when this process began.

        Raises:
            UserError: Weights & Biases is asked for and refuses.
        """
        self._config = config.training
        self._flops = flops_per_token(config.model, num_params, config.data.sequence_length)
        self._peak = peak_flops(config.model)
        self._pending: tuple[int, Mapping[str, jax.Array], float] | None = None
        self._completed, self._seconds_per_step = 0, 0.0
        self._files = ExitStack()
        first = jax.process_index() == 0
        lines = read_metrics(workdir) if first else []
        self._goodput = Goodput(lines, start_step, started, run_notes(workdir).get("began"))
        if first:
            device = f"{jax.device_count()} {jax.devices()[0].device_kind}"
            note_run(workdir, device=device, jax=jax.__version__)
        self._writer = MetricsWriter(workdir, start_step) if first else None
        self._wandb = (
            WandbWriter(workdir, config) if first and config.training.wandb_project else None
        )
        self._display = ProgressDisplay(
            start_step, self._config.steps, self._config.log_every_steps, quiet=not first
        )
        self.restart_clock()

    def __enter__(self) -> Self:
        for writer in (self._writer, self._wandb):
            if writer:
                self._files.enter_context(writer)
        self._files.enter_context(self._display)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def push(self, step: int, metrics: Mapping[str, jax.Array], data_wait_seconds: float) -> None:
        """Takes the metrics of a step that was just dispatched and completes the one before.

        Args:
            step: steps done, with this one.
            metrics: of the training step.
            data_wait_seconds: how long its batch was waited for.

        Raises:
            UserError: the limit of skipped steps in a row is reached.
        """
        pending, self._pending = self._pending, (step, metrics, data_wait_seconds)
        if pending:
            self._complete(*pending)

    def flush(self) -> None:
        """Completes the last step; call before evaluating, saving and stopping.

        Raises:
            UserError: as `push`.
        """
        pending, self._pending = self._pending, None
        if pending:
            self._complete(*pending)

    def restart_clock(self) -> None:
        """Leaves the time since the last step out of the rates."""
        self._last = time.monotonic()

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes and shows an evaluation and redraws the plot.

        Args:
            step: steps done.
            values: numbers by name, which begin with `validation_`.
        """
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
        self.print(f"step {step}  {text}")
        self._write(step, values)
        if self._writer:
            self._writer.plot()

    def report_goodput(self) -> None:
        """Prints what share of the time went into training steps."""
        values = self._goodput.values()
        run = datetime.timedelta(seconds=round(values["run_seconds"]))
        self.print(
            f"goodput: {values['run_goodput']:.1%} of the {run} since the run began went into "
            f"training steps, {values['goodput']:.1%} since this process began"
        )

    def print(self, line: str) -> None:
        """Prints a line, above the live display where there is one."""
        self._display.print(line)

    def _complete(self, step: int, metrics: Mapping[str, jax.Array], wait: float) -> None:
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        values |= self._derived(values, seconds) | {"data_wait_seconds": wait}
        self._goodput.add(seconds, updated=not values["skipped_in_a_row"])
        values |= self._goodput.values()
        self._write(step, values)
        self._display.update(step, values, self._seconds_left(step, seconds))
        if values["skipped_in_a_row"]:
            self._report_skipped(step, values)

    def _write(self, step: int, values: Mapping[str, float | None]) -> None:
        for writer in (self._writer, self._wandb):
            if writer:
                writer.write(step, values)

    def _report_skipped(self, step: int, values: Mapping[str, float]) -> None:
        norm, average = values["grad_norm"], values["grad_norm_average"]
        reason = f"gradient norm {norm:.3g}, average {average:.3g}"
        if not (math.isfinite(values["loss"]) and math.isfinite(norm)):
            reason = "loss or gradient not finite"
        self.print(f"step {step} skipped: {reason}; {values['skipped_steps']:.0f} skipped so far")
        limit = self._config.max_skipped_steps
        if values["skipped_in_a_row"] >= limit:
            raise UserError(
                f"step {step}: {limit} steps in a row skipped (config.training.max_skipped_steps), "
                f"the last for: {reason}; their updates were left out and nothing of them was "
                "saved; run again from the last checkpoint with other data or a new run with a "
                "lower config.optimizer.learning_rate"
            )

    def _derived(self, values: Mapping[str, float], seconds: float) -> dict[str, float | None]:
        rate, nll = values["tokens"] / seconds, values["loss"] * values["targets"]
        memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return {
            "bits_per_byte": bits_per_byte(nll, values["target_bytes"]),
            "tokens_per_second": rate,
            "mfu": rate * self._flops / self._peak if self._peak else None,
            "step_seconds": seconds,
            "device_memory_bytes": memory,
        }

    def _seconds_left(self, step: int, seconds: float) -> float:
        """Estimates from a running mean with a memory of about ten steps."""
        self._completed += 1
        # The first steps of a process wait for compilation, which says nothing about those to come.
        memory = 0.9 if self._completed > 3 else 0.0
        self._seconds_per_step = memory * self._seconds_per_step + (1 - memory) * seconds
        return self._seconds_per_step * (self._config.steps - step)


def bits_per_byte(nll: float, text_bytes: float) -> float:
    """Summed nll in nats to bits for each byte of the text that the targets decode to."""
    return nll / math.log(2) / max(text_bytes, 1)
