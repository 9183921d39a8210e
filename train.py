"""Trains a language model, or goes on with a run that was interrupted.

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    python train.py --config=configs/tiny.py:full --workdir=runs/full \
        --config.optimizer.learning_rate=3e-4

Any field of the configuration can be set by a flag. The same command again goes on from the newest
intact checkpoint, or says that the run is finished.

On many hosts the same command runs once a host or once a device, started by Slurm, Open MPI or
Kubernetes, or with --coordinator_address, --num_processes and --process_id; docs/clusters.md.

Exit codes: 0 the run is finished; 1 it cannot go on (damaged checkpoints, full disk, losses that
are not finite, another process lost); 2 a flag or field is wrong; 130 or 143 Ctrl-C or SIGTERM
stopped it, after saving.
"""

from asa_jax.flags import exit_on_error, run_command
from asa_jax.training.goodput import STARTED
from asa_jax.training.run_directory import Run, start_run

if __name__ == "__main__":
    # Before the seconds that it takes to import jax: what can be refused now is refused now.
    RUN = exit_on_error(start_run)

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from asa_jax.decoding.generate import Generator
from asa_jax.decoding.settings import Sampling
from asa_jax.errors import UserError
from asa_jax.interop.initial_params import load_initial_params
from asa_jax.sharding import make_mesh
from asa_jax.training.checkpoint import make_meta, restore_state
from asa_jax.training.checkpoint_writer import CheckpointWriter
from asa_jax.training.compilation_cache import use_compilation_cache
from asa_jax.training.device_memory import take_device_memory
from asa_jax.training.feed import Feed
from asa_jax.training.metrics import METRICS, PLOT, TENSORBOARD
from asa_jax.training.processes import check_shared, joined
from asa_jax.training.profile import ProfileWindow
from asa_jax.training.run_directory import CHECKPOINTS, CONFIG, forget_run
from asa_jax.training.run_log import RunLog, bits_per_byte
from asa_jax.training.signals import StopSignals
from asa_jax.training.step import Trainer, TrainState, make_trainer
from pallas_kernels import dispatch

SAMPLE_PROMPT, SAMPLE_TOKENS = "The ", 60


def main(run: Run) -> int:
    """Trains until the last step or a signal, with the other processes; returns the exit code."""
    take_device_memory()
    use_compilation_cache()
    with joined(run.launch):
        check_shared(run.workdir / CONFIG)
        return train_run(run)


def train_run(run: Run) -> int:
    """Sets up mesh, data, model and state, and trains; returns the exit code."""
    mesh = make_mesh(run.config.mesh)
    with jax.set_mesh(mesh), StopSignals() as stop, Feed(run.config, run.sources, mesh) as feed:
        trainer = make_trainer(run.config, mesh, run.sources[0].tokenizer().byte_lengths())
        meta = make_meta(run.config, mesh, trainer.state, feed.fingerprint)
        state = restore_or_start(run, trainer, feed, meta)
        finished = train(run, trainer, state, feed, meta, stop)
    if not finished:
        return stop.exit_code
    report(run)
    return 0


def restore_or_start(run: Run, trainer: Trainer, feed: Feed, meta: Mapping[str, Any]) -> TrainState:
    """Returns the state of the newest usable checkpoint, with the data there too, or of step 0."""
    restored = restore_state(run.workdir, trainer.state, meta, allow_changes=run.allow_changes)
    if restored is None:
        return start(run, trainer, feed)
    if restored.data is not None:
        feed.train.set_state(restored.data)
    return restored.state


def start(run: Run, trainer: Trainer, feed: Feed) -> TrainState:
    """Returns the state of step 0: random parameters, or those of `config.init_from`.

    Raises:
        UserError: those cannot be had; nothing of the run is left.
    """
    if not run.config.init_from:
        return trainer.init()
    path = Path(run.config.init_from).expanduser()
    try:
        params, conversions = load_initial_params(path, run.config.model, trainer.mesh, feed.peek)
    except UserError:
        if run.launch.process_id == 0:
            forget_run(run.workdir)
        raise
    if jax.process_index() == 0:
        print(f"parameters of {path}", *conversions, sep="\n  ", flush=True)
    return trainer.init()._replace(params=params)


def train(
    run: Run,
    trainer: Trainer,
    state: TrainState,
    feed: Feed,
    meta: Mapping[str, Any],
    stop: StopSignals,
) -> bool:
    """Steps, logs, saves and evaluates; returns whether it came to the last step."""
    config, start = run.config.training, int(state.step)
    if start >= config.steps:
        return True
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    with (
        RunLog(run.workdir, run.config, num_params, start, STARTED) as log,
        CheckpointWriter(run.workdir, config.keep_checkpoints) as checkpoints,
        ProfileWindow(run.workdir, config) as profile,
    ):
        log.print(
            f"{'resumes after' if start else 'starts at'} step {start} of {config.steps}: "
            f"{num_params:,} parameters on {jax.device_count()} {jax.devices()[0].device_kind}"
            + ("" if run.launch.alone else f" in {jax.process_count()} processes")
        )
        log.print(dispatch.describe(run.config.model.implementation))
        for step in range(start + 1, config.steps + 1):
            profile.before(step)
            batch, waited = feed.next()
            state, metrics = trainer.step(state, batch, trainer.schedule)
            log.push(step, metrics, waited)

            stopping = stop.arrived()
            last = stopping or step == config.steps
            if last or step % config.checkpoint_every_steps == 0:
                log.flush()
                checkpoints.save(state, feed.train.get_state(), meta)
                log.restart_clock()
            if stopping and step < config.steps:
                log.print(f"stopped after step {step}; the same command goes on from there")
                log.report_goodput()
                return False
            if last or (config.eval_every_steps and step % config.eval_every_steps == 0):
                log.flush()
                log.evaluation(step, evaluate(trainer, state.params, feed))
                log.restart_clock()
        if run.launch.alone:  # tokens are drawn in one process
            log.print(f"a sample:\n{sample(run, state.params, trainer.mesh)}\n")
        log.report_goodput()
    return True


def evaluate(trainer: Trainer, params: Any, feed: Feed) -> dict[str, float]:
    """Loss and bits per byte on validation data."""
    sums = [trainer.evaluate(params, batch) for batch in feed.validation()]
    totals = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
    return {
        "validation_loss": totals["nll"] / max(totals["targets"], 1),
        "validation_bits_per_byte": bits_per_byte(totals["nll"], totals["target_bytes"]),
    }


def sample(run: Run, params: Any, mesh: Mesh) -> str:
    """Draws the continuation of a short prompt."""
    generator = Generator(run.config, params, run.sources[0].tokenizer(), mesh)
    (text,) = generator.generate(
        [SAMPLE_PROMPT], max_tokens=SAMPLE_TOKENS, sampling=Sampling(temperature=0.8)
    )
    return SAMPLE_PROMPT + text


def report(run: Run) -> None:
    """Says where everything is and what to do next."""
    places = (CHECKPOINTS, METRICS, TENSORBOARD, PLOT)
    python = Path(sys.executable)  # a plain `python` may be another one
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    lines = [
        f"finished: {run.config.training.steps} steps",
        *(f"  {name:<14} {run.workdir / name}" for name in places),
        "next:",
        f"  {python} eval.py --workdir={run.workdir}",
        f"  {python} generate.py --workdir={run.workdir} --prompt='The '",
    ]
    # Whether anyone still reads makes no difference to a finished run.
    with contextlib.suppress(BrokenPipeError):
        if jax.process_index() == 0:
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    # At a normal exit jax would wait for processes that may be gone.
    run_command(lambda: main(RUN), leave=sys.exit if RUN.launch.alone else os._exit)
