"""Which share of the blocks that a text asks for the pool holds already, on a real model.

    python -m asa_jax.async_tls.calibrate --workdir=models/SmolLM2-135M --text=sample.txt
    python -m asa_jax.async_tls.hit_rates --workdir=models/SmolLM2-135M --text=novel.txt \\
        --output=docs/results/async_tls_hit_rates

Each context is read densely but for its last tokens, which AsyncTLS then decodes by back end B0,
under teacher forcing, at every share of blocks. The longest contexts are also decoded in the
synchronous form, with blocks of a quarter of the size, and with tokens drawn at temperature 1 in
place of the text's. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png.

Exit codes: 0 done; 1 the model or a file cannot be used; 2 a flag is wrong; 130 Ctrl-C.
"""

from asa_jax.async_tls.hit_rates_options import WARM_STEPS, Options, parse_options
from asa_jax.flags import exit_on_error, run_command

if __name__ == "__main__":
    # Before the seconds that it takes to import jax.
    OPTIONS = exit_on_error(parse_options)

import dataclasses
import datetime
import functools
import os
import shlex
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.calibration import fingerprint_of, load_channels
from asa_jax.async_tls.engine import slots_for
from asa_jax.async_tls.fidelity import read_densely
from asa_jax.async_tls.fidelity_texts import Context, pieces
from asa_jax.async_tls.hit_rates_report import POOL_FACTORS, Cosines, Record, write_report
from asa_jax.async_tls.model_layers import build_model, caches_of, layers_of, project
from asa_jax.async_tls.offloaded_model import token_width
from asa_jax.async_tls.recorded_choices import RecordingModel, found_blocks, repeated_blocks
from asa_jax.async_tls.settings import DecodingConfig, key_shape
from asa_jax.config import ModelConfig
from asa_jax.decoding.progress import show_progress
from asa_jax.decoding.runner import Runner
from asa_jax.evaluation.perplexity import text_sources
from asa_jax.interop.restore import restore_model
from asa_jax.training.compilation_cache import use_compilation_cache

COSINE_TOKENS = 2048  # of a context, the first ones
BUSY_PERCENTILE = 95


class Case(NamedTuple):
    """How a context is decoded.

    Attributes:
        share: of its blocks, that level 1 keeps.
        settings: of AsyncTLS, with as many blocks.
        drawn: whether tokens are drawn; else they are the text's.
    """

    share: float
    settings: DecodingConfig
    drawn: bool


def main(options: Options) -> None:
    """Measures and reports."""
    use_compilation_cache()
    config, params, step = restore_model(options.workdir, step=options.step)
    shape, sizes = key_shape(config.model), options.settings.sizes
    channels = load_channels(
        options.channels, (config.model.num_layers, shape.num_kv_heads, sizes.num_channels),
        shape.head_dim, fingerprint_of(config.model, params),
    )  # fmt: skip
    sources = text_sources(options.text, options.tokenizer)
    contexts = [
        one
        for length in options.lengths
        for one in pieces(sources, length, options.num_contexts, options.tail_tokens)
    ]
    runner = Runner(config.model, params, options.tokenizer.vocab_size)
    records, cosines = measure(options, contexts, runner, channels)
    header = {
        "model": options.workdir.name,
        "step": step,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "asa_jax.async_tls.hit_rates", *sys.argv[1:]]),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "texts": [path.name for path in options.text],
        "contexts": options.num_contexts,
        "steps": options.tail_tokens - WARM_STEPS,
        "compute_dtype": config.model.compute_dtype,
        "settings": dataclasses.asdict(options.settings),
    }
    for path in write_report(options.output, header, records, cosines):
        print(path)


def measure(
    options: Options, contexts: list[Context], runner: Runner, channels: np.ndarray
) -> tuple[list[Record], Cosines]:
    """Decodes every context in every way, and compares what its successive tokens give layers."""
    every = [(context, list(cases(options, context.length))) for context in contexts]
    records, found, total = [], [], sum(len(of_context) for _, of_context in every)
    with show_progress("decoded texts") as progress:
        progress(0, total)
        for context, of_context in every:
            first = context.length - context.tail
            cache = caches_of(read_densely(runner, context.tokens[:first], context.length))
            for case in of_context:
                asked = decode(runner, channels, cache, context, case)
                records.append(record_of(asked, context, case, runner.cfg))
                progress(len(records), total)
            if context.length == options.lengths[-1]:
                tokens = context.tokens[None, :COSINE_TOKENS]
                found.append(_successive_cosines(runner.params, tokens, cfg=runner.cfg))
    means = np.mean(jax.device_get(found), axis=0)
    return records, Cosines(*means.T.round(4).tolist())


def cases(options: Options, length: int) -> Iterator[Case]:
    """How contexts of a length are decoded; what level 2 keeps is at most what level 1 does."""

    def case(share: float, *, parts: int = 1, lagged: bool = True, drawn: bool = False) -> Case:
        sizes = options.settings.sizes
        block_size = sizes.block_size // parts
        num_blocks = max(1, round(share * length / sizes.block_size)) * parts
        budget = min(sizes.token_budget, num_blocks * block_size)
        sizes = dataclasses.replace(
            sizes, block_size=block_size, num_blocks=num_blocks, token_budget=budget
        )
        settings = dataclasses.replace(options.settings, sizes=sizes, lagged=lagged)
        return Case(share, settings, drawn)

    for share in options.shares:
        yield case(share)
        if length == options.lengths[-1]:
            yield case(share, lagged=False)
            yield case(share, drawn=True)
            yield case(share, parts=4)


def decode(
    runner: Runner, channels: np.ndarray, cache: list[Any], context: Context, case: Case
) -> np.ndarray:
    """Decodes the tail of a context; gives what was asked for, see `RecordingModel.asked`."""
    model = RecordingModel(runner.cfg, runner.params, case.settings, channels, "simulated", "")
    first = context.length - context.tail
    # Copies: those of dense layers are given away.
    model.load(jax.tree.map(jnp.copy, cache), np.array([first]))
    token = jnp.asarray(context.tokens[first : first + 1], jnp.int32)
    for position in range(first, context.length):
        hidden = model.step(token, jnp.full(1, position, jnp.int32))
        following = jnp.asarray(context.tokens[position + 1 : position + 2], jnp.int32)
        token = _draw(runner.params, hidden, position, cfg=runner.cfg) if case.drawn else following
    return model.asked


@functools.partial(jax.jit, static_argnames="cfg")
def _draw(params: Any, hidden: jax.Array, position: jax.Array, *, cfg: ModelConfig) -> jax.Array:
    """Tokens [B] at temperature 1 behind hidden states [B, D]."""
    logits = (hidden @ build_model(cfg, params).unembedding()).astype(jnp.float32)
    key = jax.random.fold_in(jax.random.key(0), position)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def record_of(asked: np.ndarray, context: Context, case: Case, cfg: ModelConfig) -> Record:
    """What the steps behind the first `WARM_STEPS` asked for and found."""
    settings, sizes = case.settings, case.settings.sizes
    first, steps = context.length - context.tail, slice(WARM_STEPS + settings.lagged, None)
    listed, hits, misses = (asked >= 0)[steps], {}, {}
    for factor in POOL_FACTORS:
        slots = factor * slots_for(sizes) // POOL_FACTORS[0]
        found, _ = found_blocks(asked, sizes, first, num_slots=slots, lagged=settings.lagged)
        hits[factor] = _share(found[steps], listed)
        misses[factor] = (listed & ~found[steps]).sum((1, 2, 3))
    default, shape = misses[POOL_FACTORS[0]] / asked.shape[1], key_shape(cfg)
    block_bytes = sizes.block_size * token_width(shape) * jnp.dtype(cfg.compute_dtype).itemsize
    return Record(
        length=context.length,
        context=context.number,
        share=case.share,
        block_size=sizes.block_size,
        num_blocks=sizes.num_blocks,
        lagged=settings.lagged,
        drawn=case.drawn,
        repeated=_share(repeated_blocks(asked)[steps], listed),
        hits=hits,
        missed=float(default.mean()),
        missed_at_busy_steps=float(np.percentile(default, BUSY_PERCENTILE)),
        kib=float(default.mean() * block_bytes / 2**10),
    )


def _share(part: np.ndarray, listed: np.ndarray) -> list[float]:
    """Of listed blocks [steps, layers, K, L], those of a part: of each layer."""
    return (part.sum((0, 2, 3)) / listed.sum((0, 2, 3))).round(4).tolist()


@functools.partial(jax.jit, static_argnames="cfg")
def _successive_cosines(params: Any, tokens: jax.Array, *, cfg: ModelConfig) -> jax.Array:
    """Mean cosines of successive tokens [1, T], read densely: float32 [layers, 2].

    Of what attention's projections take, the input behind its norm, and of queries, head by head.
    """
    model = build_model(cfg, params)
    x, positions = model.embedding(tokens), jnp.arange(tokens.shape[1])[None]
    found = []
    for layer in layers_of(model):
        query = project(layer, x, positions).query
        found.append(jnp.stack([_cosine(layer.attention_norm(x)), _cosine(query)]))
        x = layer(x, positions, jnp.ones_like(tokens))
    return jnp.stack(found)


def _cosine(x: jax.Array) -> jax.Array:
    """Mean cosine between neighbours of [1, T, ..., H]."""
    x = x.astype(jnp.float32)
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return (x[:, 1:] * x[:, :-1]).sum(-1).mean()


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
