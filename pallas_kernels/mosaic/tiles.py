"""Tiles of a warpgroup: their layout in shared memory, and the products of the tensor cores.

A warpgroup multiplies tiles of 64 rows. An operand in shared memory is cut in tiles of 8 rows by
one swizzle width; a result is in registers, each row of it in four threads, so that reductions
along a row stay inside a warp.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

ROWS = 64  # rows of a tile: the least that the tensor cores take
MAX_COLUMNS = 256  # of a tile: the most that the tensor cores take
LOG2E = math.log2(math.e)  # scores are kept in base 2, the base of the hardware's exponential
LAYOUT = plgpu.Layout.WGMMA
BY_ROW = LAYOUT.reduce(1)  # of a vector with one number a row of a tile
NO_MAXIMUM = -1e30  # of a row without keys so far: finite, since -inf - -inf would be NaN


def transforms(width: int, dtype: Any) -> tuple[Any, ...]:
    """Returns the tiling and the widest swizzle that rows of `width` numbers allow."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = next(size for size in (128, 64, 32) if width * itemsize % size == 0)
    tiling: Any = plgpu.TilingTransform  # mypy takes these classes for abstract ones
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, swizzle // itemsize)), swizzling(swizzle)


def tiled(shape: Sequence[int], dtype: Any, *, like_width: int | None = None) -> Any:
    """Returns a buffer in shared memory for operands of `matmul`, the last axis tiled.

    Factors of one product must be tiled alike: `like_width` tiles as for another width.
    """
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms(like_width or shape[-1], dtype))


def zeros(shape: tuple[int, ...]) -> jax.Array:
    """Returns float32 zeros in registers, a tile or a vector with one number a row of it."""
    layout = LAYOUT if len(shape) == 2 else BY_ROW
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def across(vector: jax.Array, width: int) -> jax.Array:
    """Repeats a vector with one number a row: [M] -> [M, width]."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], width), [0])


def row_ids(num_rows: int = ROWS) -> jax.Array:
    """Returns 0, 1, .. as a vector with one number a row."""
    return plgpu.broadcasted_iota(jnp.int32, (num_rows,), 0, layout=BY_ROW)


def column_ids(num_rows: int, num_columns: int) -> jax.Array:
    """Returns a tile that holds the number of its column everywhere."""
    return plgpu.broadcasted_iota(jnp.int32, (num_rows, num_columns), 1, layout=LAYOUT)


def column_parts(ref: Any) -> list[Any]:
    """Cuts an operand in shared memory in parts that products can have as columns."""
    width = ref.shape[1]
    if width <= MAX_COLUMNS:
        return [ref]
    starts = range(0, width, MAX_COLUMNS)
    return [ref.at[:, pl.ds(start, min(MAX_COLUMNS, width - start))] for start in starts]


def transposed(ref: Any) -> Any:
    """Views an operand in shared memory transposed."""
    return ref.transpose((1, 0))


def matmul(*pairs: tuple[Any, Any], interpret: Any = None) -> jax.Array:
    """Sums products [M, X] @ [X, N] in float32 registers.

    Right operands are in shared memory, left ones too or in registers, which takes `interpret`.
    """
    if interpret:
        (left, right), *_ = pairs
        return functools.reduce(_add_plain_product, pairs, zeros((left.shape[0], right.shape[1])))
    return matmuls(pairs)[0]


def matmuls(*sums: Sequence[tuple[Any, Any]]) -> tuple[jax.Array, ...]:
    """Computes several `matmul`s and waits once for all of them."""

    def body(*accumulators: Any) -> tuple[jax.Array, ...]:
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for left, right in pairs:
                plgpu.wgmma(accumulator, left, right)
        return tuple(accumulator[...] for accumulator in accumulators)

    shapes = [(pairs[0][0].shape[0], pairs[0][1].shape[1]) for pairs in sums]
    return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def add_matmul(sums: jax.Array, left: Any, right: Any, *, interpret: Any = None) -> jax.Array:
    """Adds left @ right to float32 registers; left there or in shared memory, right in that."""
    return add_matmuls((sums,), [(left, right)], interpret=interpret)[0]


def add_matmuls(
    sums: Sequence[jax.Array],
    *pairs: Sequence[tuple[Any, Any]],
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Adds products to float32 registers, several to each sum, and waits once for all of them.

    Interpret mode of jax 0.11 knows no wgmma that starts from sums, so there they are plain
    products.
    """
    if interpret:
        return tuple(
            functools.reduce(_add_plain_product, products, total)
            for total, products in zip(sums, pairs, strict=True)
        )

    def body(accumulators: Any) -> None:
        for accumulator, products in zip(accumulators, pairs, strict=True):
            for left, right in products:
                plgpu.wgmma(accumulator, left, right)

    return pl.run_state(body)(tuple(plgpu.ACC.init(total) for total in sums))


def _add_plain_product(total: jax.Array, pair: tuple[Any, Any]) -> jax.Array:
    left, right = (factor[...].astype(jnp.float32) for factor in pair)
    return total + jnp.dot(left, right)
