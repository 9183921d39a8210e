"""Measures the training speed of one configuration, on real tokens through the real input pipeline.

python -m asa_jax.training.speed --config=configs/asa_340m.py \\
    --config.data.sources="('tokens/bundled',)" --config.data.batch_size=8

Prints two lines of JSON: the device and what compilation took, and, once a line or the end of its
input was read, what was measured; `benchmark` starts many and lets them measure in turn.
"""

from asa_jax.config import Config
from asa_jax.flags import exit_on_error, parse_config_flag, run_command

if __name__ == "__main__":
    CONFIG = exit_on_error(parse_config_flag)

import json
import sys
import time
from typing import Any

import jax

from asa_jax.sharding import make_mesh
from asa_jax.training.device_memory import take_device_memory
from asa_jax.training.feed import Feed
from asa_jax.training.flops import flops_per_token, peak_flops
from asa_jax.training.run_directory import open_sources
from asa_jax.training.step import Trainer, make_trainer
from asa_jax.training.timed_steps import run_steps

WARM_STEPS, TIMED_STEPS = 3, 12
INPUT_BATCHES = 8


def main(config: Config) -> None:
    """Compiles, prints, waits for a line and measures."""
    take_device_memory()
    sources = open_sources(config)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), Feed(config, sources, mesh) as feed:
        trainer = make_trainer(config, mesh, sources[0].tokenizer().byte_lengths())
        batch, _ = feed.next()
        start = time.perf_counter()
        compiled = trainer.lower(batch).compile()
        about = {
            "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
            "compile_seconds": time.perf_counter() - start,
        }
        print(json.dumps(about), flush=True)
        sys.stdin.readline()
        trainer = trainer._replace(step=compiled)
        print(json.dumps(measure(config, trainer, feed)), flush=True)


def measure(config: Config, trainer: Trainer, feed: Feed) -> dict[str, Any]:
    """Trains for some steps.

    Args:
        config: the run.
        trainer: its functions, compiled.
        feed: its batches.

    Returns:
        step_seconds and tokens_per_second over all timed steps; mfu, the share of the devices'
        peak, None where that is not known; data_wait_seconds and dispatch_seconds of a step, which
        the host spends before the device has work; input_tokens_per_second of the pipeline alone;
        memory_bytes, the most that was in use on a device; final loss.
    """
    state, _ = run_steps(trainer, feed, trainer.init(), WARM_STEPS)
    state, times = run_steps(trainer, feed, state, TIMED_STEPS)
    rate = config.data.batch_size * config.data.sequence_length / times.total
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    flops = flops_per_token(config.model, num_params, config.data.sequence_length)
    peak = peak_flops(config.model)
    return {
        "parameters": num_params,
        "tokens_per_second": rate,
        "step_seconds": times.total,
        "mfu": rate * flops / peak if peak else None,
        "data_wait_seconds": times.data_wait,
        "dispatch_seconds": times.dispatch,
        "input_tokens_per_second": input_rate(config, feed),
        "memory_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "loss": times.loss,
    }


def input_rate(config: Config, feed: Feed) -> float:
    """Tokens a second of the input pipeline, once what it had read ahead is used up."""
    for _ in range(INPUT_BATCHES):
        feed.next()
    start = time.perf_counter()
    for _ in range(INPUT_BATCHES):
        jax.block_until_ready(feed.next()[0])
    tokens = INPUT_BATCHES * config.data.batch_size * config.data.sequence_length
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    run_command(lambda: main(CONFIG))
