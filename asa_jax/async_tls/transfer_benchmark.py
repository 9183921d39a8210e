"""Times transfers of blocks: `python -m asa_jax.async_tls.transfer_benchmark`.

Prints GB/s of fetches of random blocks from host memory, alone, and how much of a fetch is hidden
by what the device computes meanwhile: (fetch + compute - both) / the shorter of the two, with
matrix products, which are bound by arithmetic, or products with vectors, which are bound by memory
as decoding is. A fetch is as the engine's: dispatched before the compute, waited for after it was
dispatched.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.ffi_gather import FfiGatherBackend
from asa_jax.async_tls.host_thread import HostThreadBackend
from asa_jax.async_tls.pinned_blocks import NUM_CTAS
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


def measure(
    backend: HostThreadBackend, num_blocks: int, compute: Compute
) -> tuple[float, float, float]:
    """Seconds of a fetch of random blocks, of the compute beside it, and of both together."""
    rows, blocks = _random_blocks(backend, num_blocks)

    def fetch() -> None:
        backend.wait(backend.start_fetch(rows, blocks))

    def both() -> None:
        transfer = backend.start_fetch(rows, blocks)
        result = compute.run(number)
        backend.wait(transfer)
        result.block_until_ready()

    def seconds(number: int) -> float:
        return median_seconds(lambda: compute.run(number).block_until_ready())

    alone = median_seconds(fetch)
    # What the host's part costs drops out of the difference.
    step = max((seconds(9) - seconds(1)) / 8, 1e-6)
    number = math.ceil(COMPUTE_SHARE * alone / step)
    return alone, seconds(number), median_seconds(both)


def check(backend: HostThreadBackend) -> None:
    """Raises RuntimeError unless fetched blocks are those of the host."""
    rows, blocks = np.arange(ROWS), _random_blocks(backend, ROWS)[1]
    transfer = backend.start_fetch(rows, blocks)
    backend.wait(transfer)
    backend.place(transfer, rows, rows, 0 * rows)
    if not np.array_equal(np.asarray(backend.pool)[:, 0], backend.host[rows, blocks]):
        raise RuntimeError("fetched blocks are not those of the host")


def table(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Lines of the table."""
    lines = []
    work = computes(options.compute_size)
    for layout in WIDTHS:
        for name, kind, extra in _back_ends(options.num_ctas):
            backend = kind(
                ROWS, options.host_blocks // ROWS, 1, BLOCK_SIZE, WIDTHS[layout],
                jnp.dtype(jnp.bfloat16), device=jax.devices()[0], num_threads=2, **extra,
            )  # fmt: skip
            try:
                backend.host.view(np.uint16)[:] = np.random.default_rng(0).integers(
                    0x3F80, size=backend.host.shape[1:], dtype=np.uint16
                )
                check(backend)
                for number in options.num_blocks:
                    for what, compute in work.items():
                        times = measure(backend, number, compute)
                        line = _cells(layout, name, number * backend.block_bytes, what, times)
                        lines.append(line)
            finally:
                backend.close()
    return lines


def _back_ends(num_ctas: list[int]) -> list[tuple[str, Any, dict[str, int]]]:
    gathers = [(f"ffi_gather, {n} CTAs", FfiGatherBackend, {"num_ctas": n}) for n in num_ctas]
    return [("host_thread", HostThreadBackend, {}), *gathers]


def _random_blocks(backend: HostThreadBackend, number: int) -> tuple[np.ndarray, np.ndarray]:
    total = backend.host.shape[0] * backend.host.shape[1]
    numbers = np.random.default_rng(1).permutation(total)[:number]
    return np.divmod(numbers, backend.host.shape[1])


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
    parser.add_argument("--num_ctas", default=f"4,8,{NUM_CTAS},32", help="of a gather")
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
