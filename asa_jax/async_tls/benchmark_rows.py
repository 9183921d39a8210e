"""The process that measures one model at one context by one method; `benchmark` runs it.

`python -m asa_jax.async_tls.benchmark_rows ARGUMENTS` takes `Arguments` as JSON and prints a
measurement a line, as JSON.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.benchmark_models import (
    abstract_caches,
    first_inputs,
    model_of,
    next_inputs,
    random_caches,
)
from asa_jax.async_tls.benchmark_transfers import MeasuredDeviceModel, MeasuredModel
from asa_jax.async_tls.device_model import make_model
from asa_jax.async_tls.engine import slots_for
from asa_jax.async_tls.host_memory import system_available_bytes
from asa_jax.async_tls.index import init_index
from asa_jax.async_tls.model_layers import build_model
from asa_jax.async_tls.settings import DEFAULTS, DecodingConfig, decoding_config, key_shape
from asa_jax.config import ModelConfig
from asa_jax.decoding.cache_bytes import tree_bytes
from asa_jax.decoding.random_params import random_params
from asa_jax.decoding.step_bytes import serving_shapes
from asa_jax.model.transformer import abstract_model
from pallas_kernels.measurement import PROGRESS, describe_error

LARGEST = "max"
# Left free on the device for what a step and the making of an index need, and of the host's memory.
DEVICE_RESERVE_BYTES = 3 * 2**30
HOST_SHARE = 0.9
LAYERS_BEING_LOADED = 4  # caches of a layer, copies included, that are on the device at a time
WARM_STEPS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure.

    Attributes:
        model: of `benchmark_models.MODELS`.
        num_layers: of it; 0 for all.
        context: tokens of each row at the end.
        method: 'full' or 'async_tls'.
        batches: numbers of rows, `LARGEST` for as many as fit.
        settings: of AsyncTLS, fields of `settings.DEFAULTS`.
        cosine: of the inputs of two steps, see `benchmark_models`.
        num_steps: that are timed.
    """

    model: str
    num_layers: int
    context: int
    method: str
    batches: tuple[int | str, ...]
    settings: dict[str, Any]
    cosine: float
    num_steps: int


def measure(arguments: Arguments, cfg: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yields the device, and a record for each batch."""
    device = jax.devices()[0]
    yield {"device": device.device_kind, "jax": jax.__version__}
    params = random_params(serving_shapes(cfg)[1], cfg.init_stddev)
    settings = decoding_config({**DEFAULTS, **arguments.settings}, cfg)
    free = _device_bytes() - tree_bytes(params) - DEVICE_RESERVE_BYTES
    largest = _largest(cfg, settings, arguments, free)
    yield {
        "params_bytes": tree_bytes(params), "num_layers": cfg.num_layers, "largest_batch": largest
    }  # fmt: skip
    time_method = {"full": _time_full, "async_tls": _time_async_tls}[arguments.method]
    for batch in dict.fromkeys(largest if b == LARGEST else int(b) for b in arguments.batches):
        record: dict[str, Any] = {"batch": batch, "num_layers": cfg.num_layers}
        try:
            if not 0 < batch <= largest:
                raise MemoryError(f"{batch} rows do not fit, {largest} do")
            record |= time_method(cfg, params, settings, arguments, batch)
        except Exception as error:  # of any kind: one batch is lost, not the table
            record["error"] = describe_error(error)
        yield record


def _largest(
    cfg: ModelConfig, settings: DecodingConfig, arguments: Arguments, free_bytes: int
) -> int:
    """Most rows whose caches, or indexes and pools and the layer being loaded, fit."""
    caches = abstract_caches(cfg, 1, arguments.context)
    if arguments.method == "full":
        return free_bytes // tree_bytes(caches)
    shape, sizes = key_shape(cfg), settings.sizes
    dtype = jnp.dtype(cfg.compute_dtype)
    index = jax.eval_shape(
        lambda: init_index(
            1, arguments.context, shape.num_kv_heads, shape.head_dim,
            num_channels=sizes.num_channels, block_size=sizes.block_size, dtype=dtype,
        )
    )  # fmt: skip
    sparse = caches[settings.num_dense_layers :]
    of_token = tree_bytes(sparse[0]) // arguments.context
    of_layer = tree_bytes(index) + slots_for(sizes) * sizes.block_size * of_token
    of_row = tree_bytes(caches[: settings.num_dense_layers]) + len(sparse) * of_layer
    of_row += LAYERS_BEING_LOADED * tree_bytes(sparse[0])
    on_host = int(HOST_SHARE * system_available_bytes()) // tree_bytes(sparse)
    return min(free_bytes // of_row, on_host)


def _time_full(
    cfg: ModelConfig, params: Any, settings: DecodingConfig, arguments: Arguments, batch: int
) -> dict[str, Any]:
    """Steps of the whole model in one program, queued one behind another, as generate.py does."""
    caches = list(_told(cfg, arguments, batch))
    of_rows = tree_bytes(caches)
    state = jnp.zeros(batch, jnp.int32), _first_position(arguments, batch), _grouped(cfg, caches)
    del caches

    def step() -> jax.Array:
        nonlocal state
        state = _full_step(params, *state, cfg=cfg)
        return state[0]

    _seconds_a_step(step, 3)
    seconds = _seconds_a_step(step, arguments.num_steps)
    return {"milliseconds": 1e3 * seconds, "device_bytes": of_rows}


def _grouped(cfg: ModelConfig, caches: list[Any]) -> Any:
    """Caches of all layers in the groups of the model's layers."""
    model = build_model(cfg, abstract_model(cfg)[1])
    structure = jax.tree.structure(jax.eval_shape(lambda: model.init_cache(1, 1)))
    return jax.tree.unflatten(structure, jax.tree.leaves(caches))


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def _full_step(
    params: Any, tokens: jax.Array, position: jax.Array, cache: Any, *, cfg: ModelConfig
) -> tuple[jax.Array, jax.Array, Any]:
    hidden, cache = build_model(cfg, params).decode(tokens, position, cache)
    return _most_likely(build_model(cfg, params).unembedding(), hidden), position + 1, cache


@jax.jit
def _most_likely(unembedding: jax.Array, hidden: jax.Array) -> jax.Array:
    return jnp.argmax(hidden @ unembedding, axis=-1).astype(jnp.int32)


def _time_async_tls(
    cfg: ModelConfig, params: Any, settings: DecodingConfig, arguments: Arguments, batch: int
) -> dict[str, Any]:
    """Steps with transfers, the same without them, and the transfers alone."""
    model = _loaded(cfg, params, settings, arguments, batch)
    position, x = _first_position(arguments, batch), first_inputs(cfg, batch)
    unembedding, number = build_model(cfg, params).unembedding(), 0

    def step() -> jax.Array:
        nonlocal x, number
        number += 1
        x = next_inputs(x, number, cosine=arguments.cosine)
        hidden = model.step_embedded(x, position + number - 1)
        return _most_likely(unembedding, hidden)

    _seconds_a_step(step, WARM_STEPS)
    before = model.figures
    spent = _seconds_a_step(step, arguments.num_steps)
    figures = model.figures
    transfers = model.transfers_of(step, arguments.num_steps)
    model.leave_transfers_out()
    base = _seconds_a_step(step, arguments.num_steps)
    alone = model.seconds_alone(transfers) / arguments.num_steps
    counters = {
        name: value - getattr(before.counters, name)
        for name, value in dataclasses.asdict(figures.counters).items()
    }
    record = {
        "milliseconds": 1e3 * spent,
        "milliseconds_without_transfers": 1e3 * base,
        "milliseconds_of_transfers_alone": 1e3 * alone,
        "hidden_share": 1 - (spent - base) / alone if transfers else None,
        "device_bytes": model.device_bytes,
        "backend": model.backend_line,
        "tokens": figures.tokens - before.tokens,
        "counters": counters,
    }
    model.close()
    return record


def _seconds_a_step(step: Callable[[], jax.Array], number: int) -> float:
    """Median over three parts of the steps, each queued behind the one before it."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready([step() for _ in range(number // 3)])
        seconds.append((time.perf_counter() - begin) / (number // 3))
    return statistics.median(seconds)


def _loaded(
    cfg: ModelConfig, params: Any, settings: DecodingConfig, arguments: Arguments, batch: int
) -> MeasuredDeviceModel | MeasuredModel:
    """A model whose caches are full but for the steps to come."""
    shape = key_shape(cfg)
    # Which channels, does not matter: those of random keys are alike.
    spread = np.arange(settings.sizes.num_channels) * shape.head_dim // settings.sizes.num_channels
    channels = np.broadcast_to(
        spread.astype(np.int32), (cfg.num_layers, shape.num_kv_heads, spread.size)
    )
    model = make_model(cfg, params, settings, channels, MeasuredDeviceModel, MeasuredModel)
    assert isinstance(model, MeasuredDeviceModel | MeasuredModel)
    lengths = np.asarray(_first_position(arguments, batch))
    model.load(_told(cfg, arguments, batch), lengths)
    return model


def _told(cfg: ModelConfig, arguments: Arguments, batch: int) -> Iterator[Any]:
    """Random caches; says how far they are."""
    begin = time.perf_counter()
    for number, cache in enumerate(random_caches(cfg, batch, arguments.context)):
        yield cache
        _tell(arguments, batch, f"layer {number + 1} of {cfg.num_layers}", begin)
    _tell(arguments, batch, "steps, of which the first is compiled", begin)


def _tell(arguments: Arguments, batch: int, what: str, begin: float) -> None:
    place = f"{arguments.model}, {arguments.context} tokens, {arguments.method}, batch {batch}"
    seconds = time.perf_counter() - begin
    print(f"{PROGRESS}{place}: {what}, {seconds:.1f} s", file=sys.stderr, flush=True)


def _first_position(arguments: Arguments, batch: int) -> jax.Array:
    steps = WARM_STEPS + 3 * arguments.num_steps
    return jnp.full(batch, arguments.context - steps, jnp.int32)


def _device_bytes() -> int:
    """Memory of the device that this process may have."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else system_available_bytes()


def main(text: str) -> None:
    """Measures; see the module."""
    values = json.loads(text)
    arguments = Arguments(**{**values, "batches": tuple(values["batches"])})
    for record in measure(arguments, model_of(arguments.model, arguments.num_layers)):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
