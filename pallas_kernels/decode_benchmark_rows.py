"""The process that measures one operation on a cache, at every batch and context asked for.

`python -m pallas_kernels.decode_benchmark_rows NAME IMPLEMENTATION BATCHES CONTEXTS` compiles,
prints a line, waits for a line on its input, and then prints a measurement a line, all as JSON. See
`decode_benchmark`, which runs it.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import jax

from pallas_kernels import dispatch, timing
from pallas_kernels.decode_cases import DECODE_CASES, DecodeCase

MAX_BYTES = 50e9  # of arguments; the rest of 80 GB is for the processes that wait, 0.5 GB each


def fits(case: DecodeCase, batch: int, context: int) -> bool:
    """Whether the arguments of a call fit into memory."""
    shapes = jax.eval_shape(lambda: case.arguments(batch, context))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) <= MAX_BYTES


def measure(
    case: DecodeCase,
    implementation: dispatch.Implementation,
    sizes: list[tuple[int, int]],
) -> Iterator[dict[str, Any]]:
    """Yields what ran once everything is compiled, and, asked to go on, each measurement.

    Args:
      case: The operation.
      implementation: Of it.
      sizes: Batch and context of each call; those that do not fit into memory are left out.
    """
    sizes = [size for size in sizes if fits(case, *size)]
    loops: dict[tuple[int, int], Any] = {}
    for batch, context in sizes:
        try:
            arguments = jax.eval_shape(lambda: case.arguments(batch, context))  # noqa: B023
            loops[batch, context] = timing.compile_loop(
                lambda arrays: case.run(arrays, implementation), (arguments,)
            )
        except Exception as error:  # of any kind: one measurement is lost, not the table
            loops[batch, context] = error
    yield {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for (batch, context), loop in loops.items():
        result: dict[str, Any] = {"batch": batch, "context": context}
        try:
            if isinstance(loop, Exception):
                raise loop
            arrays = jax.jit(lambda: case.arguments(batch, context))()  # noqa: B023
            result["milliseconds"] = timing.milliseconds(loop, (arrays,))
        except Exception as error:  # as above
            result["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        yield result


def main(name: str, implementation: dispatch.Implementation, batches: str, contexts: str) -> None:
    """Measures the case of this name; see the module."""
    case = next(case for case in DECODE_CASES if case.name == name)
    sizes = [(int(b), int(c)) for b in batches.split(",") for c in contexts.split(",")]
    results = measure(case, implementation, sizes)
    print(json.dumps(next(results)), flush=True)
    sys.stdin.readline()
    for result in results:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
