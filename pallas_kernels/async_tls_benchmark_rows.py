"""The process that measures one method of `async_tls_cases`, at every batch and context asked for.

`python -m pallas_kernels.async_tls_benchmark_rows CASE METHOD IMPLEMENTATION BATCHES CONTEXTS`
compiles, prints a line, waits for a line on its input, and then prints a measurement a line, all as
JSON. See `async_tls_benchmark`, which runs it.
"""

import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any

from pallas_kernels import dispatch
from pallas_kernels.async_tls_cases import ASYNC_TLS_CASES, AsyncTLSCase, Method
from pallas_kernels.timed_calls import MAX_BYTES, Call, drawn_bytes, time_calls

COLD_BYTES = 100e6  # that a round of calls reads, twice what the L2 cache holds
MAX_LAYERS = 16  # of a round, since each is compiled


def num_layers(case: AsyncTLSCase, method: Method, batch: int, context: int) -> int:
    """Calls of a round, each with arguments of its own; 0 if those of one do not fit.

    A model reads the index of every layer before it comes to the first again, and so finds nothing
    of it in the L2 cache, where that of a single layer would stay.
    """
    size = drawn_bytes(lambda: case.arguments(method, batch, context))
    cold = -(-COLD_BYTES // case.floor_bytes(method, batch, context))
    return int(min(cold, MAX_LAYERS, MAX_BYTES // size))


def calls(
    case: AsyncTLSCase,
    method: Method,
    implementation: dispatch.Implementation,
    batches: str,
    contexts: str,
) -> Iterator[Call]:
    """What is timed of a method; calls that do not fit into memory are left out."""
    run = functools.partial(case.run, method, implementation=implementation)
    for batch, context in itertools.product(batches.split(","), contexts.split(",")):
        size = {"batch": int(batch), "context": int(context)}
        draw = functools.partial(case.arguments, method, *size.values())
        if layers := num_layers(case, method, **size):
            yield Call({**size, "layers": layers}, run, draw, layers)


def main(name: str, method: Method, *options: Any) -> None:
    """Measures a method of the case of this name; see the module."""
    case = next(case for case in ASYNC_TLS_CASES if case.name == name)
    time_calls(calls(case, method, *options))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
