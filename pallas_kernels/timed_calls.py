"""What a process of `measurement` does that times calls: all are compiled before any is timed."""

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from pallas_kernels import timing
from pallas_kernels.measurement import describe_error

# Of the arrays of a call; the rest of 80 GB is for the processes that wait, 0.5 GB each.
MAX_BYTES = 50e9


class Call(NamedTuple):
    """A call to time.

    Attributes:
      about: What the line with its time also says.
      function: What is called with what `draw` makes.
      draw: Makes random arrays; it is traced.
      layers: How many calls take turns, each with arrays of its own.
    """

    about: dict[str, Any]
    function: Callable[[Any], Any]
    draw: Callable[[], Any]
    layers: int = 1


def drawn_bytes(draw: Callable[[], Any]) -> int:
    """Memory that the arrays take which `draw` makes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(draw)))


def time_calls(calls: Iterable[Call]) -> None:
    """Compiles, prints what it runs on, waits for a line, and prints the times, all as JSON."""
    loops = [(call, _compile(call)) for call in calls]
    _print({"device": jax.devices()[0].device_kind, "jax": jax.__version__})
    sys.stdin.readline()
    for call, loop in loops:
        _print({**call.about, **_time(call, loop)})


def _compile(call: Call) -> Any:
    """The loop of `timing.compile_loop`, or an error: one measurement is lost, not the table."""

    def run(*layers: Any) -> list[Any]:
        return [call.function(arrays) for arrays in layers]

    try:
        return timing.compile_loop(run, [jax.eval_shape(call.draw)] * call.layers)
    except Exception as error:
        return error


def _time(call: Call, loop: Any) -> dict[str, Any]:
    try:
        if isinstance(loop, Exception):
            raise loop
        draw = jax.jit(call.draw)
        layers = [draw() for _ in range(call.layers)]
        return {"milliseconds": timing.milliseconds(loop, layers) / call.layers}
    except Exception as error:  # as above
        return {"error": describe_error(error)}


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
