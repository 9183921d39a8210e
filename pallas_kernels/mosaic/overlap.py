"""Products of tiles that the tensor cores take while a warpgroup works on the result of others.

A warpgroup starts several products and waits for them one after another. What it computes in
between runs beside those still under way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.mosaic import tiles


def matmul_during[Result](
    use: Callable[[jax.Array], Result],
    factors: tuple[Any, Any],
    sums: jax.Array,
    summed_factors: tuple[jax.Array, Any],
    interpret: Any,
) -> tuple[jax.Array, Result]:
    """Returns sums + left @ right of the summed factors, computed during use(left @ right).

    Args:
      use: Takes the product of `factors`.
      factors: The right one in shared memory.
      sums: Registers to add to.
      summed_factors: The left one in registers.
      interpret: Parameters of interpret mode, which does one after the other.
    """
    if interpret:
        sums = tiles.add_matmul(sums, *summed_factors, interpret=interpret)
        return sums, use(tiles.matmul(factors, interpret=interpret))

    def body(product: Any, accumulator: Any) -> tuple[jax.Array, Result]:
        plgpu.wgmma(product, *factors)
        accumulator[...] = sums
        plgpu.wgmma(accumulator, *summed_factors)
        results = use(plgpu.wgmma_accumulator_load(product, wait_n=1))
        return accumulator[...], results

    left, right = factors
    return pl.run_scoped(body, _accumulator(left, right), _accumulator(sums, sums))


Factors = list[tuple[Any, Any]]  # of products that are summed
Scores = tuple[list[Factors], Callable[..., jax.Array], Callable[..., jax.Array]]
Products = list[tuple[int, jax.Array, Any]]


def scores_during_sums(
    scores: Scores, sums: tuple[jax.Array, ...], products: Products, interpret: Any
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Takes weights and gradients of scores while products are summed.

    Args:
      scores: Factors of scores and of dweights, the right ones in shared memory; weigh(scores) ->
        weights; differentiate(weights, dweights) -> dscores.
      sums: Registers to add to.
      products: Number of the sum to add to, left factor in registers, right one in shared memory.
      interpret: Parameters of interpret mode, which does one after the other.

    Returns:
      Sums, weights and dscores.
    """
    factors, weigh, differentiate = scores
    if interpret:
        sums = add_matmuls(sums, products, interpret)
        scored, dweights = (tiles.matmul(*pairs, interpret=interpret) for pairs in factors)
        weights = weigh(scored)
        return sums, weights, differentiate(weights, dweights)

    def body(score: Any, dweight: Any, *accumulators: Any) -> Any:
        for accumulator, pairs in zip((score, dweight), factors, strict=True):
            for pair in pairs:
                plgpu.wgmma(accumulator, *pair)
        _start(sums, products, accumulators)
        num_after = len(factors[1]) + len(products)
        weights = weigh(plgpu.wgmma_accumulator_load(score, wait_n=num_after))
        dweights = plgpu.wgmma_accumulator_load(dweight, wait_n=len(products))
        dscores = differentiate(weights, dweights)
        return tuple(accumulator[...] for accumulator in accumulators), weights, dscores

    buffers = [_accumulator(*pairs[0]) for pairs in factors] + [_accumulator(x, x) for x in sums]
    return pl.run_scoped(body, *buffers)


def add_matmuls(
    sums: tuple[jax.Array, ...], products: Products, interpret: Any
) -> tuple[jax.Array, ...]:
    """Adds products to sums, see `scores_during_sums`."""
    if interpret:
        added = list(sums)
        for number, left, right in products:
            added[number] = tiles.add_matmul(added[number], left, right, interpret=interpret)
        return tuple(added)

    def body(*accumulators: Any) -> tuple[jax.Array, ...]:
        _start(sums, products, accumulators)
        return tuple(accumulator[...] for accumulator in accumulators)

    return pl.run_scoped(body, *(_accumulator(x, x) for x in sums))


def _accumulator(left: Any, right: Any) -> Any:
    return plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32)


def _start(sums: tuple[jax.Array, ...], products: Products, accumulators: tuple[Any, ...]) -> None:
    for accumulator, start in zip(accumulators, sums, strict=True):
        accumulator[...] = start
    for number, left, right in products:
        plgpu.wgmma(accumulators[number], left, right)
