"""Compares sparse decoders with full attention on a model: perplexity, weights kept, questions.

    python -m asa_jax.async_tls.calibrate --workdir=models/SmolLM2-135M --text=sample.txt
    python -m asa_jax.async_tls.fidelity --workdir=models/SmolLM2-135M --text=novel.txt \\
        --output=docs/results/async_tls_fidelity

Each context is read densely but for its last tokens, which every decoder then decodes at every
budget, under teacher forcing. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png. Until all is measured
it is kept in OUTPUT.partial.jsonl, so that the same command goes on after an interrupt.

Exit codes: 0 done; 1 the model or a file cannot be used; 2 a flag is wrong; 130 Ctrl-C, after the
report of the contexts that were done.
"""

from asa_jax.async_tls.fidelity_options import Options, parse_options
from asa_jax.flags import exit_on_error, run_command

if __name__ == "__main__":
    # Before the seconds that it takes to import jax.
    OPTIONS = exit_on_error(parse_options)

import datetime
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.calibration import fingerprint_of, load_channels
from asa_jax.async_tls.fidelity_records import Record, Records
from asa_jax.async_tls.fidelity_report import write_report
from asa_jax.async_tls.fidelity_texts import TEXT, Context, make_contexts
from asa_jax.async_tls.selection_masks import Budgets, Decoder
from asa_jax.async_tls.settings import NUM_ALWAYS_KEPT, key_shape
from asa_jax.async_tls.simulation import Simulation, TailScores
from asa_jax.decoding.runner import Runner
from asa_jax.interop.restore import restore_model
from asa_jax.training.compilation_cache import use_compilation_cache

SPARSE: tuple[Decoder, ...] = ("quest", "double_sparsity", "oracle_topk")
TWO_LEVEL: tuple[Decoder, ...] = ("synchronous", "lagged")


class Pass(NamedTuple):
    """A decoder at a budget.

    Attributes:
        decoder: that chooses.
        budget: tokens kept; 0 for full attention.
        candidates: tokens of level 1 for each of the budget; 0 without level 1.
    """

    decoder: Decoder
    budget: int
    candidates: int

    @property
    def name(self) -> str:
        """Of the decoder, with its candidates."""
        return f"{self.decoder}_x{self.candidates}" if self.candidates else self.decoder


def main(options: Options) -> None:
    """Measures what is not measured yet, and reports."""
    use_compilation_cache()
    config, params, step = restore_model(options.workdir, step=options.step)
    shape, cfg = key_shape(config.model), options.settings.sizes
    fingerprint = fingerprint_of(config.model, params)
    channels = load_channels(
        options.channels, (config.model.num_layers, shape.num_kv_heads, cfg.num_channels),
        shape.head_dim, fingerprint,
    )  # fmt: skip
    contexts = make_contexts(options)
    records = Records(options, fingerprint)
    runner = Runner(config.model, params, options.tokenizer.vocab_size)
    simulation = Simulation(
        runner.cfg, runner.params, channels,
        block_size=cfg.block_size, num_dense_layers=options.settings.num_dense_layers,
    )  # fmt: skip
    header = {
        "model": options.workdir.name,
        "step": step,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "asa_jax.async_tls.fidelity", *sys.argv[1:]]),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }
    try:
        measure(options, contexts, records, runner, simulation)
    finally:
        report(options, header, contexts, records)
    records.delete()


def report(
    options: Options, header: dict[str, Any], contexts: Sequence[Context], records: Records
) -> None:
    """Writes the report of those contexts that every pass was made of."""
    whole = [
        context for context in contexts
        if all(records.has(context.name, one.name, one.budget) for one in passes(options, context))
    ]  # fmt: skip
    names = {context.name for context in whole}
    found = [record for record in records.all if record.context in names]
    if any(context.kind == TEXT for context in whole):
        measured = {"contexts": len(whole), "contexts_wanted": len(contexts)}
        for path in write_report(options, header | measured, found):
            print(path)


def measure(
    options: Options,
    contexts: Sequence[Context],
    records: Records,
    runner: Runner,
    simulation: Simulation,
) -> None:
    """Runs every pass of every context that has no record."""
    wanted = {one.name: list(passes(options, one)) for one in contexts}
    progress = _Progress(sum(_cost(one) * len(wanted[one.name]) for one in contexts))
    for context in contexts:
        missing = [
            one for one in wanted[context.name]
            if not records.has(context.name, one.name, one.budget)
        ]  # fmt: skip
        progress.skip(_cost(context) * (len(wanted[context.name]) - len(missing)))
        if not missing:
            continue
        first = context.length - context.tail
        cache = read_densely(runner, context.tokens[:first], context.length)
        for one in missing:
            blocks = one.candidates * one.budget // options.settings.sizes.block_size
            budgets = Budgets(jnp.int32(one.budget), jnp.int32(blocks))
            scores = simulation.score(cache, context.tokens[first:], first, one.decoder, budgets)
            records.add(_record(context, one, jax.tree.map(np.asarray, scores)))
            progress.show(_cost(context), f"{context.name}: {one.name} {one.budget or ''}")


def passes(options: Options, context: Context) -> Iterator[Pass]:
    """What is to be decoded.

    Budgets that cover a context are full attention; level 1 that keeps all of its blocks leaves
    double_sparsity, in both forms. Neither is measured.
    """
    yield Pass("full", 0, 0)
    kept = NUM_ALWAYS_KEPT * options.settings.sizes.block_size
    budgets = [n for n in options.budgets if n + kept < context.length - context.tail]
    # Questions and jumps tell most at small budgets, and take as long.
    for budget in budgets if context.kind == TEXT else budgets[:2]:
        for decoder in SPARSE:
            yield Pass(decoder, budget, 0)
        for candidates in options.candidates:
            if candidates * budget + kept < context.length:
                for decoder in TWO_LEVEL:
                    yield Pass(decoder, budget, candidates)


def read_densely(runner: Runner, tokens: np.ndarray, length: int) -> Any:
    """The caches of one row, of `length` slots, after a text was read densely."""
    state = runner.empty(1, length)
    size = runner.chunk_size(len(tokens), length)
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(tokens)] = tokens
    lengths = np.array([len(tokens)], np.int32)
    for offset in range(0, len(tokens), size):
        offset = min(offset, length - size)
        state = runner.read(state, padded[:, offset : offset + size], offset, lengths)
    return state.cache


def _record(context: Context, one: Pass, scores: TailScores) -> Record:
    return Record(
        context=context.name,
        kind=context.kind,
        length=context.length,
        decoder=one.name,
        budget=one.budget,
        nats=[round(float(x), 5) for x in scores.nll],
        answers=[
            (round(float(scores.nll[a.start - 1 : a.stop - 1].sum()), 5),
             bool(scores.correct[a.start - 1 : a.stop - 1].all()), a.stop - a.start)
            for a in context.answers
        ],
        mass=[round(float(x), 5) for x in scores.figures.mass],
        recall=[round(float(x), 5) for x in scores.figures.recall],
    )  # fmt: skip


def _cost(context: Context) -> int:
    """Of a pass, as far as contexts differ."""
    return context.length * context.tail


class _Progress:
    """Lines with what is done and how long the rest will take."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._skipped = total, 0, 0
        self._start = time.monotonic()

    def skip(self, cost: int) -> None:
        """Counts what was measured before."""
        self._done += cost
        self._skipped += cost

    def show(self, cost: int, name: str) -> None:
        """Counts a pass and prints it."""
        self._done += cost
        spent = time.monotonic() - self._start
        left = spent * (self._total - self._done) / (self._done - self._skipped)
        eta = datetime.timedelta(seconds=round(left))
        print(f"{self._done / self._total:4.0%}  ETA {eta}  {name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
