"""Checks of a kernel of attention to a range of keys against its definition in XLA."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

Attend = Callable[..., tuple[jax.Array, jax.Array]]  # of query, key, value or None, segment_ids
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]


def abstract(shapes: Shapes, dtype: Any = jnp.bfloat16) -> list[Any]:
    return [None if shape is None else jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def lower_for_cuda(function: Any, *arguments: Any) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def lower_gradient(attend: Attend, shapes: Shapes, packed: bool) -> str:
    """Lowers forward and backward pass, also of the log-sum-exp, for a GPU."""
    query, key, value = abstract(shapes)
    segment_ids = jax.ShapeDtypeStruct(query.shape[:2], jnp.int32) if packed else None

    def loss(query, key, value, segment_ids):  # type: ignore[no-untyped-def]
        output, lse = attend(query, key, value, segment_ids)
        return output.astype(jnp.float32).sum() + lse.sum()

    wanted = (0, 1) if value is None else (0, 1, 2)
    return lower_for_cuda(jax.grad(loss, wanted), query, key, value, segment_ids)


def packed_row(length: int) -> jax.Array:
    """Documents that start at multiples of 64, with padding between and behind them."""
    row = np.zeros(length, np.int32)
    row[: length // 2 - 10] = 1
    second = -(-length // 128) * 64
    row[second : second + length // 4] = 2
    third = second + -(-length // 256) * 64
    row[third : length - 5] = 3
    return jnp.asarray(row)[None]


def relative_error(actual: jax.Array, desired: jax.Array) -> float:
    difference = actual.astype(jnp.float32) - desired.astype(jnp.float32)
    norm = float(jnp.linalg.norm(desired.astype(jnp.float32).ravel()))
    return float(jnp.linalg.norm(difference.ravel())) / max(norm, 1e-30)


def with_gradients(attend: Attend, doutput: jax.Array, dlse: jax.Array) -> Any:
    def run(query, key, value, segment_ids):  # type: ignore[no-untyped-def]
        results, pull = jax.vjp(lambda *x: attend(*x, segment_ids), query, key, value)
        seen = results[1] > -jnp.inf
        return results, pull((doutput.astype(results[0].dtype), jnp.where(seen, dlse, 0)))

    return run


def check_against_definition(
    attend: Attend,
    definition: Attend,
    shapes: Shapes,
    value_dim: int,
    segment_ids: jax.Array | None = None,
    *,
    repeats: bool = False,
) -> None:
    """Compares outputs and gradients, from bfloat16 inputs, with those in float32.

    Args:
      attend: The kernel; called under jit if it shall repeat.
      definition: What it computes.
      shapes: Of query, key and value.
      value_dim: h.
      segment_ids: Documents.
      repeats: Whether to ask also for bit-equal gradients of two runs.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = [
        None if shape is None else jax.random.normal(k, shape, jnp.bfloat16)
        for k, shape in zip(keys, shapes, strict=False)
    ]
    rows = shapes[0][:3]
    doutput = jax.random.normal(keys[3], (*rows, value_dim), jnp.bfloat16)
    run = with_gradients(attend, doutput, jax.random.normal(keys[4], rows))
    run = jax.jit(run) if repeats else run
    (output, lse), gradients = actual = run(*arrays, segment_ids)
    if repeats:
        chex.assert_trees_all_equal(actual, run(*arrays, segment_ids))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(with_gradients(definition, doutput, jax.random.normal(keys[4], rows)))(
            *exact, segment_ids
        )
    chex.assert_trees_all_equal_shapes(actual, wanted)
    chex.assert_trees_all_equal_dtypes(gradients, tuple(arrays))
    (wanted_output, wanted_lse), wanted_gradients = wanted
    seen = jnp.isfinite(wanted_lse)
    chex.assert_trees_all_equal(jnp.isfinite(lse), seen)
    chex.assert_trees_all_close(jnp.where(seen, lse, 0), jnp.where(seen, wanted_lse, 0), atol=1e-4)
    assert not jnp.where(seen[..., None], 0, output).any()
    assert relative_error(output, wanted_output) < 5e-3
    for gradient, wanted_gradient in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True
    ):
        assert relative_error(gradient, wanted_gradient) < 6e-3
