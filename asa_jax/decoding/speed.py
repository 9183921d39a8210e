"""Measures decoding of one architecture with random weights and caches of random numbers.

python -m asa_jax.decoding.speed --config=configs/asa_340m.py --sizes=1x4096,32x65536
python -m asa_jax.decoding.speed --config=configs/asa_1b.py --prefill_tokens=65536
python -m asa_jax.decoding.speed --config=configs/asa_1b.py --largest_context=65536

Prints lines of JSON: the device, once everything is compiled, and, once a line or the end of its
input was read, a measurement a line; `benchmark` starts many and lets them measure in turn. The
programs are those that generate.py runs.
"""

from asa_jax.decoding.speed_options import Options, parse_options
from asa_jax.flags import exit_on_error, run_command

if __name__ == "__main__":
    OPTIONS = exit_on_error(parse_options)

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.config import ModelConfig
from asa_jax.decoding.cache_bytes import tree_bytes
from asa_jax.decoding.random_params import random_params
from asa_jax.decoding.runner import make_draws, memory_bytes
from asa_jax.decoding.settings import CHUNK_TOKENS, Sampling
from asa_jax.decoding.step_bytes import read_bytes, serving_shapes, weight_bytes
from asa_jax.decoding.steps import DecodeState, draw_tokens, empty_state, read_chunk
from pallas_kernels.measurement import describe_error

STEPS, REPEATS = 64, 3  # tokens of a dispatch, and dispatches of which the median counts
COMPILATIONS = 4  # at a time
GREEDY = Sampling(temperature=0.0)

# Measures with parameters, once its programs are compiled.
Measure = Callable[[Any], dict[str, Any]]


class Job(NamedTuple):
    """What to measure: what is known of it before, and how to prepare it."""

    about: dict[str, Any]
    prepare: Callable[[], Measure]


def main(options: Options) -> None:
    """Compiles, prints, waits for a line and measures."""
    start = time.perf_counter()
    cfg, shapes = serving_shapes(options.cfg)
    jobs = list(_jobs(options, cfg, shapes))
    with ThreadPoolExecutor(COMPILATIONS) as pool:
        measures = list(pool.map(_prepare, jobs))
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps({**about, "compile_seconds": time.perf_counter() - start}), flush=True)
    sys.stdin.readline()
    params = random_params(shapes, cfg.init_stddev)
    for job, measure in zip(jobs, measures, strict=True):
        print(json.dumps({**job.about, **_result(measure, params)}), flush=True)


def _jobs(options: Options, cfg: ModelConfig, shapes: Any) -> Iterator[Job]:
    for rows, context in options.sizes:
        about = {"row": "decode", "batch": rows, "context": context}
        yield Job(about, functools.partial(prepare_decode, cfg, shapes, rows, context))
    if tokens := options.prefill_tokens:
        about = {"row": "prefill", "batch": 1, "context": tokens}
        yield Job(about, functools.partial(prepare_prefill, cfg, shapes, tokens))
    if context := options.largest_context:
        about = {"row": "largest", "context": context}
        yield Job(about, functools.partial(prepare_largest, cfg, shapes, context))


def _prepare(job: Job) -> Measure | Exception:
    try:
        return job.prepare()
    except Exception as error:  # of any kind: one measurement is lost, not the table
        return error


def _result(measure: Measure | Exception, params: Any) -> dict[str, Any]:
    try:
        if isinstance(measure, Exception):
            raise measure
        return measure(params)
    except Exception as error:  # as above
        return {"error": describe_error(error)}


def prepare_decode(cfg: ModelConfig, shapes: Any, rows: int, context: int) -> Measure:
    """Compiles the loop that draws tokens; measures it with caches of `context` tokens a row.

    Args:
        cfg: the architecture, layers in a list.
        shapes: of its parameters.
        rows: texts.
        context: tokens of each at the end of a dispatch, and of its cache.

    Returns:
        A function of the parameters that gives milliseconds of a token, the bytes that a step needs
        of weights and caches, and bytes of the cache by accounting and as allocated; `needed_bytes`
        alone where they do not fit.
    """
    accounted = tree_bytes(_state_shapes(cfg, rows, context).cache)
    needed = tree_bytes(shapes) + accounted
    program = _compile_loop(cfg, shapes, rows, context) if needed <= _limit() else None
    if program is None or program_bytes(program) > _limit():
        return lambda params: {"needed_bytes": program_bytes(program) if program else needed}

    def measure(params: Any) -> dict[str, Any]:
        state = _fill(empty_state(cfg=cfg, num_rows=rows, cache_length=context))
        held = [leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(state.cache)]
        seconds = []
        for _ in range(1 + REPEATS):
            state = _hold(state, context - STEPS)
            start = time.perf_counter()
            state, drawn = program(params, state, _draws(cfg, rows), np.int32(STEPS))
            jax.block_until_ready(drawn.num_drawn)
            seconds.append((time.perf_counter() - start) / STEPS)
        return {
            "milliseconds": 1e3 * statistics.median(seconds[1:]),
            "weight_bytes": weight_bytes(cfg, params),
            "read_bytes": read_bytes(cfg, rows, context),
            "accounted_bytes": accounted,
            "allocated_bytes": sum(held),
        }

    return measure


def prepare_prefill(cfg: ModelConfig, shapes: Any, tokens: int) -> Measure:
    """Compiles the reading of a chunk; measures that of a row of `tokens`, in seconds."""
    size = min(tokens, CHUNK_TOKENS)
    integers = jax.ShapeDtypeStruct((1, size), jnp.int32), np.int32(0), np.zeros(1, np.int32)
    state = _state_shapes(cfg, 1, tokens)
    program = read_chunk.lower(shapes, state, *integers, cfg=cfg).compile()

    def seconds(params: Any) -> float:
        text = np.random.default_rng(0).integers(cfg.vocab_size, size=(1, tokens), dtype=np.int32)
        state = empty_state(cfg=cfg, num_rows=1, cache_length=tokens)
        start = time.perf_counter()
        for offset in range(0, tokens, size):
            chunk = text[:, offset : offset + size]
            state = program(params, state, chunk, np.int32(offset), np.array([tokens], np.int32))
        jax.block_until_ready(state)
        return time.perf_counter() - start

    def measure(params: Any) -> dict[str, Any]:
        seconds(params)
        return {"prefill_seconds": statistics.median(seconds(params) for _ in range(REPEATS))}

    return measure


def prepare_largest(cfg: ModelConfig, shapes: Any, context: int) -> Measure:
    """Finds the most rows of `context` tokens that fit beside the weights, and decodes with them.

    Args:
        cfg: the architecture, layers in a list.
        shapes: of its parameters.
        context: tokens of each row.

    Returns:
        A function of the parameters that gives the rows by accounting of weights and caches alone,
        and as many as were allocated and decoded.
    """
    room = _limit() - tree_bytes(shapes)
    accounted = rows = room // tree_bytes(_state_shapes(cfg, 1, context))
    program = _compile_loop(cfg, shapes, rows, context)
    while (needed := program_bytes(program)) > _limit():
        each = (needed - tree_bytes(shapes)) / rows
        rows = min(rows - 1, int(room / each))
        program = _compile_loop(cfg, shapes, rows, context)

    def measure(params: Any) -> dict[str, Any]:
        state = _hold(empty_state(cfg=cfg, num_rows=rows, cache_length=context), context - STEPS)
        _, drawn = program(params, state, _draws(cfg, rows), np.int32(2))
        jax.block_until_ready(drawn.num_drawn)
        return {"accounted_batch": accounted, "largest_batch": rows}

    return measure


def program_bytes(program: Any) -> int:
    """Memory that a compiled program takes, arguments and results with it."""
    sizes = program.memory_analysis()
    own = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + own


def _limit() -> int:
    return memory_bytes(jax.local_devices()[:1])


def _state_shapes(cfg: ModelConfig, rows: int, context: int) -> DecodeState:
    empty = functools.partial(empty_state, cfg=cfg, num_rows=rows, cache_length=context)
    return jax.eval_shape(empty)


def _draws(cfg: ModelConfig, rows: int) -> Any:
    # No row ends.
    return make_draws([0] * rows, rows, [cfg.vocab_size], GREEDY)


def _compile_loop(cfg: ModelConfig, shapes: Any, rows: int, context: int) -> Any:
    """The loop as `complete` runs it: all tokens in one dispatch."""
    state = _state_shapes(cfg, rows, context)
    return draw_tokens.lower(
        shapes, state, _draws(cfg, rows), np.int32(STEPS), cfg=cfg, vocab_size=cfg.vocab_size,
        size=STEPS, num_alternatives=0,
    ).compile()  # fmt: skip


def _fill(state: DecodeState) -> DecodeState:
    """The state with random numbers in the places of keys, values and latents."""

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(empty: jax.Array, key: jax.Array) -> jax.Array:
        # One row for all, which lie in memory of their own, so that drawing takes little of it.
        return empty.at[:].set(jax.random.normal(key, (1, *empty.shape[1:]), empty.dtype))

    leaves, structure = jax.tree.flatten(state.cache)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    filled = [
        fill(leaf, key) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return state._replace(cache=jax.tree.unflatten(structure, filled))


def _hold(state: DecodeState, tokens: int) -> DecodeState:
    """The state as if its caches held so many tokens of each row, which goes on."""
    rows = state.lengths.size
    return state._replace(lengths=jnp.full(rows, tokens, jnp.int32), ended=jnp.zeros(rows, bool))


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
