"""Device time of a function: calls queued on the device, so that the host's part does not show."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# The number is known when the loop is compiled, else the device would ask the host after each call
# whether to go on.
CALLS_PER_LOOP = 8
REPEATS = 5  # timed queues of loops, of which the median counts
QUEUE_SECONDS = 0.03


def compile_loop(function: Callable[..., Any], arguments: Any) -> Callable[..., jax.Array]:
    """Compiles `CALLS_PER_LOOP` calls of `function(*arguments)`, one after another.

    Args:
      function: Returns a pytree of arrays.
      arguments: Its arguments, or their shapes and types.
    """

    @jax.jit
    def loop(*arguments: Any) -> jax.Array:
        def body(_: jax.Array, checksum: jax.Array) -> jax.Array:
            # The barriers keep the call inside the loop, and each of its results needed in full.
            current, checksum = lax.optimization_barrier((arguments, checksum))
            results = [lax.optimization_barrier(x) for x in jax.tree.leaves(function(*current))]
            firsts = (result[(0,) * result.ndim].astype(jnp.float32) for result in results)
            return functools.reduce(jnp.add, firsts)

        return lax.fori_loop(0, CALLS_PER_LOOP, body, jnp.float32(0))

    return loop.lower(*arguments).compile()


def milliseconds(loop: Callable[..., jax.Array], arguments: Any) -> float:
    """Returns the median time of a call, warm, from a loop of `compile_loop`."""

    def seconds(num_loops: int) -> float:
        start = time.perf_counter()
        results = [loop(*arguments) for _ in range(num_loops)]
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / (num_loops * CALLS_PER_LOOP)

    seconds(1)
    num_loops = max(2, round(QUEUE_SECONDS / (seconds(1) * CALLS_PER_LOOP)))
    return 1e3 * statistics.median(seconds(num_loops) for _ in range(REPEATS))
