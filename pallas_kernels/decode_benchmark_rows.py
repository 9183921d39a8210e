"""The process that measures one operation on a cache, at every batch and context asked for.

`python -m pallas_kernels.decode_benchmark_rows NAME IMPLEMENTATION BATCHES CONTEXTS` compiles,
prints a line, waits for a line on its input, and then prints a measurement a line, all as JSON. See
`decode_benchmark`, which runs it.
"""

import functools
import itertools
import sys
from collections.abc import Iterator

from pallas_kernels import dispatch
from pallas_kernels.decode_cases import DECODE_CASES, DecodeCase
from pallas_kernels.timed_calls import MAX_BYTES, Call, drawn_bytes, time_calls


def calls(
    case: DecodeCase, implementation: dispatch.Implementation, batches: str, contexts: str
) -> Iterator[Call]:
    """What is timed of a case; calls that do not fit into memory are left out."""
    run = functools.partial(case.run, implementation=implementation)
    for batch, context in itertools.product(batches.split(","), contexts.split(",")):
        about = {"batch": int(batch), "context": int(context)}
        draw = functools.partial(case.arguments, *about.values())
        if drawn_bytes(draw) <= MAX_BYTES:
            yield Call(about, run, draw)


def main(name: str, implementation: dispatch.Implementation, batches: str, contexts: str) -> None:
    """Measures the case of this name; see the module."""
    case = next(case for case in DECODE_CASES if case.name == name)
    time_calls(calls(case, implementation, batches, contexts))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
