"""The process that measures one method of `async_tls_cases`, at every batch and context asked for.

`python -m pallas_kernels.async_tls_benchmark_rows CASE METHOD IMPLEMENTATION BATCHES CONTEXTS`
compiles, prints a line, waits for a line on its input, and then prints a measurement a line, all as
JSON. See `async_tls_benchmark`, which runs it.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import jax

from pallas_kernels import dispatch, timing
from pallas_kernels.async_tls_cases import ASYNC_TLS_CASES, AsyncTLSCase, Method

MAX_BYTES = 50e9  # of arguments; the rest of 80 GB is for the processes that wait, 0.5 GB each
COLD_BYTES = 100e6  # that a round of calls reads, twice what the L2 cache holds
MAX_LAYERS = 16  # of a round, since each is compiled


def num_layers(case: AsyncTLSCase, method: Method, batch: int, context: int) -> int:
    """Calls of a round, each with arguments of its own; 0 if those of one do not fit.

    A model reads the index of every layer before it comes to the first again, and so finds nothing
    of it in the L2 cache, where that of a single layer would stay.
    """
    shapes = jax.eval_shape(lambda: case.arguments(method, batch, context))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    cold = -(-COLD_BYTES // case.floor_bytes(method, batch, context))
    return int(min(cold, MAX_LAYERS, MAX_BYTES // size))


def measure(
    case: AsyncTLSCase,
    method: Method,
    implementation: dispatch.Implementation,
    sizes: list[tuple[int, int]],
) -> Iterator[dict[str, Any]]:
    """Yields what ran once everything is compiled, and, asked to go on, each measurement.

    Args:
      case: Sizes of a layer.
      method: What is measured.
      implementation: Of it.
      sizes: Batch and context of each call; those that do not fit into memory are left out.
    """

    def run(layers: list[Any]) -> list[Any]:
        return [case.run(method, layer, implementation) for layer in layers]

    layers_of = {size: num_layers(case, method, *size) for size in sizes}
    loops: dict[tuple[int, int], Any] = {}
    for size, num in layers_of.items():
        if num == 0:
            continue
        try:
            arguments = jax.eval_shape(lambda: case.arguments(method, *size))  # noqa: B023
            loops[size] = timing.compile_loop(run, ([arguments] * num,))
        except Exception as error:  # of any kind: one measurement is lost, not the table
            loops[size] = error
    yield {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for size, loop in loops.items():
        result: dict[str, Any] = dict(zip(("batch", "context"), size, strict=True))
        result["layers"] = layers_of[size]
        try:
            if isinstance(loop, Exception):
                raise loop
            draw = jax.jit(lambda: case.arguments(method, *size))  # noqa: B023
            layers = [draw() for _ in range(layers_of[size])]
            result["milliseconds"] = timing.milliseconds(loop, (layers,)) / layers_of[size]
        except Exception as error:  # as above
            result["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        yield result


def main(
    name: str,
    method: Method,
    implementation: dispatch.Implementation,
    batches: str,
    contexts: str,
) -> None:
    """Measures a method of the case of this name; see the module."""
    case = next(case for case in ASYNC_TLS_CASES if case.name == name)
    sizes = [(int(b), int(c)) for b in batches.split(",") for c in contexts.split(",")]
    results = measure(case, method, implementation, sizes)
    print(json.dumps(next(results)), flush=True)
    sys.stdin.readline()
    for result in results:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
