"""Device time of a function: a loop on the device, so that the host's part does not show."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

REPEATS = 5  # timed loops, of which the median counts
LOOP_SECONDS = 0.03


def compile_loop(function: Callable[..., Any], arguments: Any) -> Callable[..., jax.Array]:
    """Compiles `function(*arguments)`, repeated as often as its first argument says.

    Args:
      function: Returns a pytree of arrays.
      arguments: Its arguments, or their shapes and types.
    """

    @jax.jit
    def loop(count: jax.Array, arguments: Any) -> jax.Array:
        def body(_: jax.Array, checksum: jax.Array) -> jax.Array:
            # The barriers keep the call inside the loop, and each of its results needed in full.
            current, checksum = lax.optimization_barrier((arguments, checksum))
            results = [lax.optimization_barrier(x) for x in jax.tree.leaves(function(*current))]
            firsts = (result[(0,) * result.ndim].astype(jnp.float32) for result in results)
            return functools.reduce(jnp.add, firsts)

        return lax.fori_loop(0, count, body, jnp.float32(0))

    return loop.lower(jax.ShapeDtypeStruct((), jnp.int32), arguments).compile()


def milliseconds(loop: Callable[..., jax.Array], arguments: Any) -> float:
    """Returns the median time of a call, warm, in a loop of `compile_loop`."""

    def run(count: int) -> float:
        start = time.perf_counter()
        loop(jnp.int32(count), arguments).block_until_ready()
        return time.perf_counter() - start

    run(2)
    count = max(1, min(1000, round(LOOP_SECONDS / max(1e-9, run(8) / 8))))
    return 1e3 * statistics.median(run(count) / count for _ in range(REPEATS))
