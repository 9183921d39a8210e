"""Checks of a kernel of attention to a range of keys against its definition in XLA."""

import functools
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
        assert not jnp.where(wanted_gradient.any(-1, keepdims=True), 0, gradient).any()


def lower_transformed(attend: Attend, shapes: Shapes) -> str:
    """Lowers the gradient under each of the transformations of `transformed` for a GPU."""
    arrays = abstract(shapes)
    texts = [lower_for_cuda(function, *arrays) for function in transformed(attend).values()]
    return "".join(texts)


def transformed(attend: Attend) -> dict[str, Callable[..., Any]]:
    """Returns functions of query, key and value, all with one result, by what they go through.

    The result is a loss of two layers and its gradients. Batches have a row.
    """

    def layer(attend: Attend, query: jax.Array, key: jax.Array, value: jax.Array | None) -> Any:
        output, lse = attend(query, key, value, None)
        moved = query.at[..., : output.shape[-1]].add(output)
        return moved, jnp.where(lse > -jnp.inf, lse, 0).sum()

    def with_gradient(layers: Callable[..., Any]) -> Callable[..., Any]:
        def loss(query, key, value):  # type: ignore[no-untyped-def]
            query, lse_sums = layers(query, key, value)
            return (query.astype(jnp.float32) ** 2).sum() + lse_sums.sum()

        return lambda query, key, value: jax.value_and_grad(
            loss, (0, 1) if value is None else (0, 1, 2)
        )(query, key, value)

    def in_turn(query, key, value, attend=attend):  # type: ignore[no-untyped-def]
        query, first = layer(attend, query, key, value)
        query, second = layer(attend, query, key, value)
        return query, jnp.stack([first, second])

    def scanned(query, key, value):  # type: ignore[no-untyped-def]
        def step(query, _):  # type: ignore[no-untyped-def]
            return layer(attend, query, key, value)

        return jax.lax.scan(jax.checkpoint(step), query, None, length=2)

    def mapped(query, key, value, segment_ids):  # type: ignore[no-untyped-def]
        rows = jax.tree.map(lambda x: x[None], (query, key, value))
        results = jax.vmap(lambda row: attend(*row, segment_ids))(rows)
        return jax.tree.map(lambda x: x[0], results)

    def sharded(query, key, value, segment_ids):  # type: ignore[no-untyped-def]
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((1,), ("data",), axis_types=auto, devices=jax.devices()[:1])
        spec = jax.sharding.PartitionSpec("data")
        run = jax.shard_map(
            lambda arrays: attend(*arrays, segment_ids),
            mesh=mesh, in_specs=spec, out_specs=spec,
            check_vma=False,  # Mosaic GPU forgets over which axes its results vary
        )  # fmt: skip
        return run((query, key, value))

    return {
        "nothing": with_gradient(in_turn),
        "remat and scan": with_gradient(scanned),
        "vmap": with_gradient(functools.partial(in_turn, attend=mapped)),
        "shard_map": with_gradient(functools.partial(in_turn, attend=sharded)),
    }


def check_transformed(attend: Attend, shapes: Shapes) -> None:
    """Checks that jit, remat, scan, vmap and shard_map leave results and gradients as they are."""
    arrays = [
        None if shape is None else jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate(shapes)
    ]
    functions = transformed(attend)
    wanted = functions.pop("nothing")(*arrays)
    for function in functions.values():
        for actual, desired in zip(
            jax.tree.leaves(jax.jit(function)(*arrays)), jax.tree.leaves(wanted), strict=True
        ):
            assert relative_error(actual, desired) < 1e-3


def long_array(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Draws [B, T, ..] of normal numbers for less: every token has a factor of its own."""
    keys = jax.random.split(jax.random.key(seed))
    period = min(shape[1], 8191)
    pattern = jax.random.normal(keys[0], (shape[0], period, *shape[2:]), jnp.bfloat16)
    factor = jax.random.normal(keys[1], (1, shape[1], *(1 for _ in shape[2:])), jnp.bfloat16)
    return pattern[:, jnp.arange(shape[1]) % period] * factor


def check_spots(
    attend: Attend,
    sees: Callable[[jax.Array, jax.Array], jax.Array],
    shapes: Shapes,
    value_dim: int,
    scale: float,
    *,
    gradients: bool,
) -> None:
    """Compares a few tokens, and gradients of a few keys, with a dense computation in float32.

    Args:
      attend: The kernel.
      sees: Takes tokens [R, 1] and keys [S], returns whether these see those.
      shapes: Of query, key and value; one row.
      value_dim: h.
      scale: Factor of the scores.
      gradients: Whether to compare them too.
    """
    query, key, value = (
        None if shape is None else jax.jit(long_array, static_argnums=(0, 1))(i, shape)
        for i, shape in enumerate(shapes)
    )
    length, num_keys = query.shape[1], key.shape[1]
    rows = jnp.linspace(64, length - 1, 17).astype(jnp.int32)
    in_float = functools.partial(jnp.asarray, dtype=jnp.float32)

    def dense(query: jax.Array, key: jax.Array, value: jax.Array | None) -> Any:
        value = key[..., :value_dim] if value is None else value
        seen = sees(rows[:, None], jnp.arange(num_keys))
        groups = query.reshape(len(rows), key.shape[2], -1, query.shape[-1])
        scores = scale * jnp.einsum("rkgh,skh->rkgs", groups, in_float(key[0]))
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        output = jnp.einsum("rkgs,skh->rkgh", jax.nn.softmax(scores), in_float(value[0]))
        lse = jax.nn.logsumexp(scores, axis=-1)
        return output.reshape(len(rows), query.shape[1], -1), lse.reshape(len(rows), -1)

    if gradients:
        doutput = jax.jit(long_array, static_argnums=(0, 1))(7, (*query.shape[:3], value_dim))
        run = jax.jit(with_gradients(attend, doutput, jnp.zeros(query.shape[:3])))
        (output, lse), (dquery, dkey, dvalue) = run(query, key, value, None)
    else:
        output, lse = jax.jit(attend)(query, key, value, None)
    with jax.default_matmul_precision("highest"):
        wanted, pull = jax.vjp(lambda rows: dense(rows, key, value), in_float(query[0, rows]))
        assert relative_error(output[0, rows], wanted[0]) < 5e-3
        chex.assert_trees_all_close(lse[0, rows], wanted[1], atol=1e-3)
        if not gradients:
            return
        (wanted_dquery,) = pull((in_float(doutput[0, rows]), jnp.zeros_like(wanted[1])))
        assert relative_error(dquery[0, rows], wanted_dquery) < 1e-2
        few = jnp.linspace(0, num_keys - 1, 5).astype(jnp.int32)
        wanted_gradients = key_gradients(
            query, key, value, output, doutput, lse, sees, value_dim, scale, few
        )
        for gradient, desired in zip((dkey, dvalue), wanted_gradients, strict=True):
            if gradient is not None:
                assert relative_error(gradient[0, few], desired) < 1e-2


def key_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    output: jax.Array,
    doutput: jax.Array,
    lse: jax.Array,
    sees: Callable[[jax.Array, jax.Array], jax.Array],
    value_dim: int,
    scale: float,
    few: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns gradients of a few keys [F, K, H] and values [F, K, h], of results in `lse`.

    Where value is None, the first holds both.
    """
    num_kv_heads = key.shape[2]

    def by_group(array: jax.Array) -> jax.Array:
        rows = array[0].astype(jnp.float32)
        return rows.reshape(rows.shape[0], num_kv_heads, -1, *rows.shape[2:])

    query, output, doutput, lse = (by_group(x) for x in (query, output, doutput, lse))
    keys = key[0, few].astype(jnp.float32)
    values = keys[..., :value_dim] if value is None else value[0, few].astype(jnp.float32)
    seen = sees(jnp.arange(query.shape[0])[:, None], few)[:, None, None]
    scores = scale * jnp.einsum("tkgh,fkh->tkgf", query, keys)
    weights = jnp.exp(jnp.where(seen, scores - lse[..., None], -jnp.inf))
    delta = (output * doutput).sum(-1)[..., None]
    dscores = scale * weights * (jnp.einsum("tkgh,fkh->tkgf", doutput, values) - delta)
    dkey = jnp.einsum("tkgf,tkgh->fkh", dscores, query)
    dvalue = jnp.einsum("tkgf,tkgh->fkh", weights, doutput)
    if value is None:
        dkey = dkey.at[..., :value_dim].add(dvalue)
    return dkey, dvalue
