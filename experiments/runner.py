"""Runs stages as processes, one at a time in each slot of a GPU, until all are done or time is up.

Nothing is lost by a kill: a stage counts as done when its result is written, training goes on from
its own checkpoints, and other stages begin anew.
"""

import ctypes
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asa_jax.errors import UserError
from asa_jax.flags import PROJECT
from asa_jax.training.device_memory import VARIABLES
from asa_jax.training.metrics import read_metrics
from experiments.results import drop_result, read_result, write_result
from experiments.stages import Stage

POLL_SECONDS, STATUS_SECONDS = 0.5, 30.0
# For a trainer to save after the signal; then it is killed.
SAVING_SECONDS = 60.0
MEMORY_SHARE = 0.9  # of a GPU, for all of its processes together
_PR_SET_PDEATHSIG = 1


class Slot(NamedTuple):
    """Room for one process.

    Attributes:
        gpu: number of the GPU as CUDA counts them; None: whatever jax finds.
        share: which of several on the same GPU.
    """

    gpu: str | None
    share: int


class Running(NamedTuple):
    """A stage at work.

    Attributes:
        stage: of it.
        process: that does it.
        started: in time.monotonic.
        output: what it prints, read when it has ended.
        errors: what all of its processes, one after the other, said to stderr.
    """

    stage: Stage
    process: subprocess.Popen[bytes]
    started: float
    output: Path
    errors: Path


def make_slots(gpus: Sequence[str]) -> list[Slot]:
    """One slot for each name; a GPU named twice has two."""
    if not gpus:
        return [Slot(None, 0)]
    return [Slot(gpu, gpus[:index].count(gpu)) for index, gpu in enumerate(gpus)]


class Runner:
    """Runs the stages of a comparison."""

    def __init__(
        self,
        stages: Sequence[Stage],
        output: Path,
        slots: Sequence[Slot],
        environment: Mapping[str, str],
        deadline: float | None,
    ) -> None:
        """Looks what is finished; starts nothing.

        Args:
            stages: in the order of work.
            output: folder of runs, results and logs.
            slots: where stages run.
            environment: of their processes.
            deadline: in time.monotonic, when to stop; None: when all is done.
        """
        self._output, self._slots, self._deadline = output, slots, deadline
        self._environment = dict(environment)
        self._stages = list(stages)
        self._seconds: dict[str, list[float]] = {}
        self._done = {stage.key for stage in stages if self._is_finished(stage)}
        self._want_again()
        self._failed: dict[tuple[str, str], str] = {}
        self._running: dict[Slot, Running] = {}
        self._stopped: int | None = None
        self._next_status = 0.0

    def run(self) -> int:
        """Works until everything is done, nothing more can be, time is up, or a signal comes.

        Returns:
            The exit code: 0 done or time is up; 1 a stage failed; 128 + n after signal n.
        """
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._say(f"{len(self._done)} of {len(self._stages)} stages are finished")
            while not self._must_stop() and (self._start_stages() or self._running):
                time.sleep(POLL_SECONDS)
                self._reap()
                self._report_status()
            return self._end()
        finally:
            self._stop_all(signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: Any) -> None:
        self._stopped = self._stopped or number

    def _must_stop(self) -> bool:
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return late or self._stopped is not None

    def _end(self) -> int:
        unfinished = self._running != {} or self._stopped is not None
        if self._running:
            self._say("stopping: trainers save and end")
            self._stop_all(signal.SIGTERM)
        for (run, name), reason in self._failed.items():
            self._say(f"failed: {run} {name}: {reason}")
        left = len(self._stages) - len(self._done)
        if left:
            hint = "" if self._failed and not unfinished else "; the same command goes on from here"
            self._say(f"{left} of {len(self._stages)} stages are left{hint}")
        if self._stopped is not None:
            return 128 + self._stopped
        return int(bool(self._failed))

    def _is_finished(self, stage: Stage) -> bool:
        result = read_result(self._output, *stage.key)
        if result is not None:
            self._seconds.setdefault(stage.name, []).append(result["stage_seconds"])
        return result is not None

    def _want_again(self) -> None:
        """Takes back what left files that are gone, as on another machine, and are still read.

        A training that is done again takes with it all that was read from its parameters: results
        of a run are of one training.
        """
        # A stage comes after those that it needs: so what needs it is known before it.
        for stage in reversed(self._stages):
            if stage.key in self._done and self._is_wanted_again(stage):
                self._done.remove(stage.key)
        for stage in self._stages:
            if any(
                other.workdir == stage.checkpoint is not None and other.key not in self._done
                for other in self._stages
            ):
                self._done.discard(stage.key)
        for stage in self._stages:
            if stage.key not in self._done and drop_result(self._output, *stage.key):
                self._say(f"{stage.run} {stage.name} is done again: files of this run are gone")

    def _is_wanted_again(self, stage: Stage) -> bool:
        if stage.leaves is None or stage.leaves.exists():
            return False
        return any(
            stage.key in other.needs for other in self._stages if other.key not in self._done
        )

    def _start_stages(self) -> bool:
        """Starts what can be started; returns whether anything was."""
        started = False
        for slot in self._slots:
            if slot not in self._running and (stage := self._next_stage(slot)):
                self._running[slot] = self._start(stage, slot)
                started = True
        return started

    def _next_stage(self, slot: Slot) -> Stage | None:
        """The first stage that is ready; one to be timed waits for its GPU, and others for it."""
        neighbours = [r.stage for s, r in self._running.items() if s.gpu == slot.gpu]
        if any(stage.alone for stage in neighbours):
            return None
        busy = {running.stage.key for running in self._running.values()}
        for stage in self._stages:
            if stage.key in self._done | self._failed.keys() | busy:
                continue
            if not set(stage.needs) <= self._done:
                continue
            return None if stage.alone and neighbours else stage
        return None

    def _start(self, stage: Stage, slot: Slot) -> Running:
        logs = self._output / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        output, errors = (logs / f"{stage.run}.{stage.name}.{kind}" for kind in ("out", "err"))
        self._say(f"{stage.run} {stage.name} begins" + (f" on GPU {slot.gpu}" if slot.gpu else ""))
        # What a command said before it was stopped is not its result.
        with output.open("w") as said, errors.open("a") as complained:
            process = subprocess.Popen(
                [sys.executable, *stage.command()],
                stdin=subprocess.DEVNULL, stdout=said, stderr=complained, cwd=PROJECT,
                env=self._stage_environment(slot, stage), start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        return Running(stage, process, time.monotonic(), output, errors)

    def _stage_environment(self, slot: Slot, stage: Stage) -> dict[str, str]:
        if slot.gpu is None:
            return self._environment
        sharing = 1 if stage.alone else sum(other.gpu == slot.gpu for other in self._slots)
        # jax refuses both names of the share at once, so none of the user's stays.
        given = {name: x for name, x in self._environment.items() if name not in VARIABLES}
        share = f"{MEMORY_SHARE / sharing:.3f}"
        return given | {"CUDA_VISIBLE_DEVICES": slot.gpu, VARIABLES[0]: share}

    def _reap(self) -> None:
        for slot, running in list(self._running.items()):
            if running.process.poll() is not None:
                del self._running[slot]
                self._finish(running)

    def _finish(self, running: Running) -> None:
        """Writes the result of a process that has ended, or says why it has none."""
        stage, seconds = running.stage, time.monotonic() - running.started
        if running.process.returncode:
            reason = _last_line(running.errors)
            self._failed[stage.key] = f"exit {running.process.returncode}: {reason}"
            self._say(f"{stage.run} {stage.name} failed: {reason}")
            return
        try:
            result = stage.collect(running.output.read_text())
        except (UserError, OSError, ValueError, KeyError) as error:
            self._failed[stage.key] = f"its result cannot be read ({error})"
            return
        # A training that was cut and went on took longer than its last process.
        seconds = max(seconds, result.get("step_seconds", 0.0))
        write_result(self._output, *stage.key, {**result, "stage_seconds": seconds})
        self._done.add(stage.key)
        self._seconds.setdefault(stage.name, []).append(seconds)
        self._say(f"{stage.run} {stage.name} done in {seconds:.0f} s")

    def _stop_all(self, number: int) -> None:
        """Signals all processes and waits for them; results of those that end well count."""
        for running in self._running.values():
            running.process.send_signal(number)
        limit = time.monotonic() + SAVING_SECONDS
        while self._running and time.monotonic() < limit:
            for slot, running in list(self._running.items()):
                if running.process.poll() is None:
                    continue
                del self._running[slot]
                if running.process.returncode == 0:
                    self._finish(running)
            time.sleep(POLL_SECONDS / 5)
        for running in self._running.values():
            running.process.kill()
        self._running.clear()

    def _report_status(self) -> None:
        if time.monotonic() < self._next_status:
            return
        self._next_status = time.monotonic() + STATUS_SECONDS
        now = [_describe(running.stage) for running in self._running.values()]
        self._say(f"{len(self._done)}/{len(self._stages)}  {'; '.join(now)}  {self._time_left()}")

    def _time_left(self) -> str:
        """An estimate from the finished stages of the same name."""
        elapsed = {r.stage.key: time.monotonic() - r.started for r in self._running.values()}
        left = [s for s in self._stages if s.key not in self._done | self._failed.keys()]
        unknown = Counter(stage.name for stage in left if stage.name not in self._seconds)
        known = [
            max(0.0, sum(took) / len(took) - elapsed.get(stage.key, 0.0))
            for stage in left
            if (took := self._seconds.get(stage.name))
        ]
        minutes = sum(known) / len(self._slots) / 60
        more = "".join(f" + {count} x {name}" for name, count in unknown.items())
        return f"about {minutes:.0f} min{more} left"

    def _say(self, line: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def _end_with_parent() -> None:
    """Has the kernel end the process with its parent, however that ends (Linux).

    At once: one that was still saving would be in the way of a runner that is started anew.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no message"


def _describe(stage: Stage) -> str:
    """What a running stage is at."""
    lines = read_metrics(stage.workdir) if stage.workdir else []
    steps = [line for line in lines if line.get("loss") is not None]
    if not steps:
        return f"{stage.run} {stage.name}"
    last = steps[-1]
    return (
        f"{stage.run} {stage.name} step {last['step']}, loss {last['loss']:.3f}, "
        f"{last['tokens_per_second']:,.0f} tokens/s"
    )
