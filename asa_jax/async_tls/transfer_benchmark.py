"""Times transfers of blocks: `python -m asa_jax.async_tls.transfer_benchmark`.

Prints GB/s of fetches of random blocks from host memory, alone, and how much of a fetch is hidden
by what the device computes meanwhile: (fetch + compute - both) / the shorter of the two, with
matrix products, which are bound by arithmetic, or products with vectors, which are bound by memory
as decoding is. A fetch is dispatched before the compute and waited for after it was dispatched.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.host_thread import HostThreadBackend
from asa_jax.async_tls.pinned_blocks import PinnedBlocks
from asa_jax.async_tls.pool_exchange import NUM_CTAS, exchange, init_pool, join
from asa_jax.errors import exit_on_user_error
from pallas_kernels.measurement import check_numbers, describe_setting, markdown_table

BLOCK_SIZE, ROWS = 64, 8
# Numbers of a token: grouped queries have key and value of 128, absorbed latents 512 + 64.
WIDTHS = {"gqa": 256, "mla": 576}
HEADER = (
    "layout", "back end", "MiB", "fetch ms", "GB/s", "compute", "compute ms", "both ms", "hidden %",
)  # fmt: skip
# Of a fetch: compute that is shorter cannot hide it.
COMPUTE_SHARE = 1.5
_REPEATS = 7


class Compute(NamedTuple):
    """Work for the device: `step` is dispatched as often as the work is to last."""

    step: Callable[[jax.Array, jax.Array], jax.Array]
    matrix: jax.Array
    first: jax.Array

    def run(self, number: int) -> jax.Array:
        """Dispatches `number` steps, one on the result of the other."""
        result = self.first
        for _ in range(number):
            result = self.step(self.matrix, result)
        return result


def computes(size: int) -> dict[str, Compute]:
    """Work that is bound by arithmetic and work that is bound by memory."""
    square = jnp.full((size, size), 1 / size, jnp.bfloat16)
    tall = jnp.full((16 * size, size), 1 / size, jnp.bfloat16)

    @jax.jit
    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return x @ y

    @jax.jit
    def with_vector(x: jax.Array, y: jax.Array) -> jax.Array:
        return (x @ y).reshape(-1, len(y)).mean(0)

    vector = jnp.ones(size, jnp.bfloat16)
    return {
        "matrices": Compute(product, square, square),
        "vectors": Compute(with_vector, tall, vector),
    }


def median_seconds(function: Callable[[], Any]) -> float:
    """The median time of a call, warm."""
    function()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Fetches(Protocol):
    """Fetches of the same random blocks, one after another."""

    host: np.ndarray

    def start(self) -> None:
        """Starts one; what was computed before may still be under way."""

    def wait(self) -> None:
        """Waits until it landed."""

    def fetched(self) -> np.ndarray:
        """The blocks [n, ...] that landed last."""

    def close(self) -> None:
        """Gives all memory back."""


class HostThreadFetches:
    """`Fetches` by back end B1."""

    def __init__(self, shape: tuple[int, ...], numbers: np.ndarray) -> None:
        """Allocates; blocks of `shape` [rows, blocks, ...] are numbered row after row."""
        rows, blocks, size, width = shape
        self._backend = HostThreadBackend(
            rows, blocks, 1, size, width, np.dtype(jnp.bfloat16),
            device=jax.devices()[0], num_threads=2,
        )  # fmt: skip
        self.host = self._backend.host
        self._places = np.divmod(numbers, blocks)

    def start(self) -> None:
        """See `Fetches`."""
        self._transfer = self._backend.start_fetch(*self._places)

    def wait(self) -> None:
        """See `Fetches`."""
        self._backend.wait(self._transfer)

    def fetched(self) -> np.ndarray:
        """See `Fetches`."""
        return np.asarray(self._transfer.result())[: len(self._places[0])]

    def close(self) -> None:
        """See `Fetches`."""
        self._backend.close()


class FfiGatherFetches:
    """`Fetches` by back end B3, each block to a slot of its own."""

    def __init__(self, shape: tuple[int, ...], numbers: np.ndarray, num_ctas: int) -> None:
        """As of `HostThreadFetches`; `num_ctas` thread blocks move blocks."""
        self._pinned = PinnedBlocks(shape, np.dtype(jnp.bfloat16), jax.devices()[0])
        self.host = self._pinned.host
        self._request = self._pinned.source(), numbers[None].astype(np.int32)
        self._pool = init_pool(jnp.zeros((1, len(numbers), *shape[2:]), jnp.bfloat16))
        self._exchange = functools.partial(_exchange, num_ctas=num_ctas)

    def start(self) -> None:
        """See `Fetches`."""
        self._pool = self._exchange(self._pool, *self._request)

    def wait(self) -> None:
        """See `Fetches`."""
        self._pool = jax.block_until_ready(_join(self._pool))

    def fetched(self) -> np.ndarray:
        """See `Fetches`."""
        return np.asarray(self._pool.blocks)[0]

    def close(self) -> None:
        """See `Fetches`."""
        self._pinned.close()


_exchange = jax.jit(exchange, donate_argnums=0, static_argnames="num_ctas")
_join = jax.jit(join, donate_argnums=0)


def measure(fetches: Fetches, compute: Compute) -> tuple[float, float, float]:
    """Seconds of a fetch of random blocks, of the compute beside it, and of both together."""

    def fetch() -> None:
        fetches.start()
        fetches.wait()

    def both() -> None:
        fetches.start()
        result = compute.run(number)
        fetches.wait()
        result.block_until_ready()

    def seconds(number: int) -> float:
        return median_seconds(lambda: compute.run(number).block_until_ready())

    alone = median_seconds(fetch)
    # What the host's part costs drops out of the difference.
    step = max((seconds(9) - seconds(1)) / 8, 1e-6)
    number = math.ceil(COMPUTE_SHARE * alone / step)
    return alone, seconds(number), median_seconds(both)


def check(fetches: Fetches, numbers: np.ndarray) -> None:
    """Raises RuntimeError unless fetched blocks are those of the host."""
    fetches.start()
    fetches.wait()
    blocks = fetches.host.reshape(-1, *fetches.host.shape[2:])
    if not np.array_equal(fetches.fetched(), blocks[numbers]):
        raise RuntimeError("fetched blocks are not those of the host")


def table(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Lines of the table."""
    lines = []
    work = computes(options.compute_size)
    for layout in WIDTHS:
        shape = ROWS, options.host_blocks // ROWS, BLOCK_SIZE, WIDTHS[layout]
        for number in options.num_blocks:
            numbers = np.random.default_rng(1).permutation(options.host_blocks)[:number]
            for name, kind in _back_ends(options.num_ctas):
                fetches = kind(shape, numbers)
                try:
                    fetches.host.view(np.uint16)[:] = np.random.default_rng(0).integers(
                        0x3F80, size=shape[1:], dtype=np.uint16
                    )
                    check(fetches, numbers)
                    size = number * fetches.host[0, 0].nbytes
                    for what, compute in work.items():
                        lines.append(_cells(layout, name, size, what, measure(fetches, compute)))
                finally:
                    fetches.close()
    return lines


def _back_ends(num_ctas: list[int]) -> list[tuple[str, Callable[..., Fetches]]]:
    exchanges: list[tuple[str, Callable[..., Fetches]]] = [
        (f"ffi_gather, {number} CTAs", functools.partial(FfiGatherFetches, num_ctas=number))
        for number in num_ctas
    ]
    return [("host_thread", HostThreadFetches), *exchanges]


def _cells(
    layout: str, name: str, size: int, what: str, times: tuple[float, float, float]
) -> tuple[str, ...]:
    alone, compute, both = times
    hidden = (alone + compute - both) / min(alone, compute)
    return (
        layout, name, f"{size / 2**20:.0f}", f"{1e3 * alone:.3f}", f"{size / alone / 1e9:.1f}",
        what, f"{1e3 * compute:.3f}", f"{1e3 * both:.3f}", f"{100 * hidden:.0f}",
    )  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="asa_jax.async_tls.transfer_benchmark", description=__doc__
    )
    parser.add_argument("--num_blocks", default="128,1024", help="of a fetch")
    parser.add_argument("--num_ctas", default=f"4,8,{NUM_CTAS},32", help="thread blocks of B3")
    parser.add_argument("--host_blocks", type=int, default=8192, help="to choose from")
    parser.add_argument("--compute_size", type=int, default=4096, help="of the matrices")
    options = parser.parse_args(arguments)
    check_numbers(parser, options, "num_blocks", "num_ctas")
    for name in ("num_blocks", "num_ctas"):
        setattr(options, name, [int(part) for part in getattr(options, name).split(",")])
    if options.compute_size < 1:
        parser.error("--compute_size: must be at least 1")
    if options.host_blocks % ROWS or options.host_blocks < max(ROWS, *options.num_blocks):
        parser.error(f"--host_blocks: must be a multiple of {ROWS}, and not below --num_blocks")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse(arguments)
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    about = describe_setting([device], "asa_jax.async_tls.transfer_benchmark", arguments)
    with exit_on_user_error():
        print("\n".join(markdown_table(HEADER, table(options))))
    print("\n" + "\n".join(f"- {name}: {value}" for name, value in about.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
