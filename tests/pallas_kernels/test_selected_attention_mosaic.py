"""The Mosaic GPU kernels of selected_attention: lowering, numbers against the reference."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selected_attention import mosaic_gpu, reference, selected_attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call; value_dim None: the value has arrays of its own."""

    name: str
    num_kv_heads: int
    heads: int  # of each key head
    queries_per_selection: int
    block_size: int
    head_dim: int
    value_dim: int
    shares_value: bool
    num_selected_blocks: int

    def __str__(self) -> str:
        return self.name


SHAPES = (
    Shape("asa", 2, 8, 4, 16, 160, 128, True, 64),
    Shape("asa_every_query", 2, 8, 1, 16, 160, 128, True, 64),
    Shape("asa_192", 2, 8, 4, 16, 192, 128, True, 128),
    Shape("asa_1b", 2, 8, 4, 16, 320, 256, True, 64),
    Shape("asa_one_group", 1, 16, 4, 16, 160, 128, True, 64),
    Shape("nsa_64", 4, 4, 4, 64, 64, 64, False, 16),
    Shape("nsa_64_every_query", 4, 4, 1, 64, 64, 64, False, 16),
    Shape("nsa_128", 4, 16, 1, 64, 128, 128, False, 16),
    Shape("nsa_128_four_queries", 4, 16, 4, 64, 128, 128, False, 16),
    Shape("one_head", 4, 1, 4, 16, 64, 64, False, 128),
    Shape("one_head_every_query", 4, 1, 1, 64, 128, 128, False, 16),
)
FORWARD_ONLY = (Shape("mla_576", 1, 16, 4, 64, 576, 512, True, 16),)
SMALL = (
    Shape("blocks_of_16", 1, 8, 4, 16, 160, 128, True, 3),
    Shape("wide_keys", 1, 8, 4, 16, 320, 256, True, 3),
    Shape("blocks_of_64", 1, 4, 4, 64, 64, 64, False, 2),
)


def array_shapes(shape: Shape, batch: int, length: int) -> tuple[tuple[int, ...] | None, ...]:
    """Shapes of query, key, value and block_indices."""
    num_kv_heads = shape.num_kv_heads
    num_groups = -(-length // shape.queries_per_selection)
    return (
        (batch, length, num_kv_heads * shape.heads, shape.head_dim),
        (batch, length, num_kv_heads, shape.head_dim),
        None if shape.shares_value else (batch, length, num_kv_heads, shape.value_dim),
        (batch, num_groups, num_kv_heads, shape.num_selected_blocks),
    )


def draw(shape: Shape, batch: int, length: int, seed: int = 0) -> tuple[Any, ...]:
    """Draws query, key, value and lists with holes, repetitions and blocks after the query."""
    keys = jax.random.split(jax.random.key(seed), 4)
    *floats, indices = array_shapes(shape, batch, length)
    arrays = [
        None if dims is None else jax.random.normal(key, dims, jnp.bfloat16)
        for key, dims in zip(keys, floats, strict=False)
    ]
    num_blocks = -(-length // shape.block_size)
    block_indices = jax.random.randint(keys[3], indices, -1, num_blocks, jnp.int32)
    return *arrays, block_indices


def kernel(shape: Shape, interpret: Any = None) -> Any:
    def attend(query, key, value, block_indices, segment_ids=None):  # type: ignore[no-untyped-def]
        return mosaic_gpu.selected_attention(
            query, key, value, block_indices, shape.block_size, shape.queries_per_selection,
            shape.value_dim, segment_ids, shape.head_dim**-0.5, interpret=interpret,
        )  # fmt: skip

    return attend


def definition(shape: Shape) -> Any:
    def attend(query, key, value, block_indices, segment_ids=None):  # type: ignore[no-untyped-def]
        value = key[..., : shape.value_dim] if value is None else value
        return reference.selected_attention(
            query, key, value, block_indices, shape.block_size, shape.queries_per_selection,
            segment_ids, shape.head_dim**-0.5,
        )  # fmt: skip

    return attend


def with_gradients(attend: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """Returns a function from (query, key, value, lists, ...) to outputs and gradients."""

    def run(query, key, value, *rest):  # type: ignore[no-untyped-def]
        results, pull = jax.vjp(lambda *x: attend(*x, *rest), query, key, value)
        doutput, dlse = cotangents
        dlse = jnp.where(results[1] > -jnp.inf, dlse, 0)
        return results, pull((doutput.astype(results[0].dtype), dlse))

    return run


def poison_memory() -> None:
    """Fills memory of the device with NaN, and frees it: what is not written then shows."""
    jnp.full(2**28, jnp.nan).block_until_ready()


def relative_error(actual: jax.Array, desired: jax.Array) -> float:
    difference = actual.astype(jnp.float32) - desired.astype(jnp.float32)
    return float(jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(desired.ravel()))


def check_against_definition(
    shape: Shape, batch: int, length: int, segment_ids: Any = None, interpret: Any = None
) -> None:
    query, key, value, block_indices = draw(shape, batch, length)
    keys = jax.random.split(jax.random.key(9))
    output_shape = (*query.shape[:3], shape.value_dim)
    cotangents = (
        jax.random.normal(keys[0], output_shape, jnp.bfloat16),
        jax.random.normal(keys[1], query.shape[:3]),
    )
    rest = (block_indices, segment_ids)
    run = with_gradients(kernel(shape, interpret), cotangents)
    if not interpret:
        run = jax.jit(run)
        poison_memory()
    actual = run(query, key, value, *rest)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (query, key, value))
    with jax.default_matmul_precision("highest"):
        desired = jax.jit(with_gradients(definition(shape), cotangents))(*exact, *rest)
    chex.assert_trees_all_equal_shapes(actual, desired)
    (output, lse), gradients = actual
    (desired_output, desired_lse), desired_gradients = desired
    chex.assert_trees_all_equal(jnp.isfinite(lse), jnp.isfinite(desired_lse))
    sees_any = jnp.isfinite(lse)
    chex.assert_trees_all_close(lse[sees_any], desired_lse[sees_any], atol=1e-5)
    assert relative_error(output, desired_output) < 5e-3
    chex.assert_trees_all_equal(output[~sees_any], jnp.zeros_like(output[~sees_any]))
    for gradient, wanted in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(desired_gradients), strict=True
    ):
        chex.assert_tree_all_finite(gradient)
        assert relative_error(gradient, wanted) < 8e-3


def lower_for_cuda(function: Any, *arguments: Any) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def abstract(shape: Shape, batch: int, length: int) -> list[Any]:
    *floats, indices = array_shapes(shape, batch, length)
    arrays = [None if x is None else jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in floats]
    return [*arrays, jax.ShapeDtypeStruct(indices, jnp.int32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lowers_for_cuda_with_gradients(shape: Shape) -> None:
    query, key, value, block_indices = abstract(shape, 1, 8192)
    segment_ids = jax.ShapeDtypeStruct((1, 8192), jnp.int32)

    def loss(query, key, value, block_indices, segment_ids):  # type: ignore[no-untyped-def]
        output, lse = kernel(shape)(query, key, value, block_indices, segment_ids)
        return output.astype(jnp.float32).sum() + lse.sum()

    wanted = (0, 1) if value is None else (0, 1, 2)
    text = lower_for_cuda(jax.grad(loss, wanted), query, key, value, block_indices, segment_ids)
    num_sums = 1 if shape.shares_value else 2
    assert text.count("@mosaic_gpu") == 3 + num_sums  # forward, query, items of keys, their sums


@pytest.mark.parametrize("shape", FORWARD_ONLY, ids=str)
def test_forward_lowers_for_cuda(shape: Shape) -> None:
    assert "@mosaic_gpu" in lower_for_cuda(kernel(shape), *abstract(shape, 1, 4096))


@pytest.mark.parametrize("length", [65, 1_048_576])
def test_forward_lowers_for_any_length(length: int) -> None:
    assert "@mosaic_gpu" in lower_for_cuda(kernel(SHAPES[0]), *abstract(SHAPES[0], 1, length))


def test_lowers_under_vmap_remat_and_scan() -> None:
    shape = SHAPES[0]
    arguments = abstract(shape, 1, 512)

    def layers(query, key, value, block_indices):  # type: ignore[no-untyped-def]
        @jax.checkpoint
        def layer(query, _):  # type: ignore[no-untyped-def]
            output, _ = kernel(shape)(query, key, value, block_indices)
            return jnp.pad(output, ((0, 0), (0, 0), (0, 0), (0, 32))), None

        return jax.lax.scan(layer, query, None, length=3)[0].astype(jnp.float32).sum()

    assert "@mosaic_gpu" in lower_for_cuda(jax.grad(layers), *arguments)
    batched = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), arguments)
    assert "@mosaic_gpu" in lower_for_cuda(jax.vmap(kernel(shape)), *batched)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 8, "queries_per_selection": 4}, "block_size: 8"),
        ({"head_dim": 96, "value_dim": 96, "shares_value": False}, "96/96"),
        ({"head_dim": 144}, "128 of 144"),
        ({"head_dim": 320, "value_dim": 256, "block_size": 64}, "64 with a value of 256"),
        ({"heads": 32}, "over 64 rows"),
    ],
)
def test_says_what_it_does_not_take(change: dict[str, Any], message: str) -> None:
    shape = dataclasses.replace(SHAPES[0], **change)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(kernel(shape), *abstract(shape, 1, 128))


def test_takes_no_float32() -> None:
    arguments = [
        x if x is None or x.dtype == jnp.int32 else jax.ShapeDtypeStruct(x.shape, jnp.float32)
        for x in abstract(SHAPES[0], 1, 128)
    ]
    with pytest.raises(NotImplementedError, match="float32"):
        jax.eval_shape(kernel(SHAPES[0]), *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_interpreted_kernels_match_the_definition(shape: Shape) -> None:
    check_against_definition(shape, 1, 70, interpret=plgpu.InterpretGPUParams())


def documents(length: int) -> jax.Array:
    """Documents of 5, 200 and the rest, at multiples of 64, and padding."""
    row = np.zeros((2, length), np.int32)
    row[:, :5], row[:, 64:264], row[:, 320 : length - 70] = 1, 2, 3
    return jnp.asarray(row)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_the_definition(shape: Shape, packed: bool) -> None:
    length = 1000
    check_against_definition(shape, 2, length, documents(length) if packed else None)


def asa_run(length: int, batch: int = 1) -> tuple[Any, tuple[Any, ...]]:
    """A jitted call with all gradients, and arguments."""
    shape = SHAPES[0]
    query, key, value, block_indices = draw(shape, batch, length)
    keys = jax.random.split(jax.random.key(5))
    output_shape = (*query.shape[:3], shape.value_dim)
    cotangents = (
        jax.random.normal(keys[0], output_shape),
        jax.random.normal(keys[1], output_shape[:3]),
    )
    run = jax.jit(with_gradients(kernel(shape), cotangents))
    return run, (query, key, value, block_indices)


@pytest.mark.gpu
def test_gradients_repeat_bit_for_bit() -> None:
    run, arguments = asa_run(4096)
    first = run(*arguments)
    poison_memory()
    chex.assert_trees_all_equal(run(*arguments), first)


@pytest.mark.gpu
def test_shard_map_changes_nothing() -> None:
    run, arguments = asa_run(1024)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    chex.assert_trees_all_equal(sharded(*arguments), run(*arguments))


@pytest.mark.gpu
def test_vmap_changes_nothing() -> None:
    run, arguments = asa_run(1024)
    others = draw(SHAPES[0], 1, 1024, seed=1)
    both = jax.tree.map(lambda *x: jnp.stack(x), arguments, others)
    wanted = jax.tree.map(lambda *x: jnp.stack(x), run(*arguments), run(*others))
    chex.assert_trees_all_equal(jax.jit(jax.vmap(run))(*both), wanted)


@pytest.mark.gpu
def test_remat_and_scan_give_the_same_gradients() -> None:
    shape = SHAPES[0]
    query, key, value, block_indices = draw(shape, 1, 1024)

    def layer(query, key):  # type: ignore[no-untyped-def]
        output, _ = kernel(shape)(query, key, value, block_indices)
        return jnp.pad(output, ((0, 0), (0, 0), (0, 0), (0, shape.head_dim - shape.value_dim)))

    def scanned(query, key):  # type: ignore[no-untyped-def]
        step = jax.checkpoint(lambda query, _: (layer(query, key), None))
        return jax.lax.scan(step, query, None, length=2)[0].astype(jnp.float32).sum()

    def unrolled(query, key):  # type: ignore[no-untyped-def]
        return layer(layer(query, key), key).astype(jnp.float32).sum()

    actual, wanted = (jax.jit(jax.grad(f, (0, 1)))(query, key) for f in (scanned, unrolled))
    for gradient, other in zip(actual, wanted, strict=True):
        assert relative_error(gradient, other) < 8e-3  # sums in bfloat16 in another order


@pytest.mark.gpu
def test_long_rows_match_the_definition_at_some_queries() -> None:
    shape, length, size = SHAPES[0], 262_144, 4
    query, key, _, block_indices = draw(shape, 1, length)
    groups = jnp.array([0, 1, 7, 1000, 32_767, 32_768, 65_534, 65_535])
    tokens = (groups[:, None] * size + jnp.arange(size)).reshape(-1)
    doutput = jax.random.normal(jax.random.key(3), (1, tokens.size, 16, 128), jnp.bfloat16)

    def run(query, key):  # type: ignore[no-untyped-def]
        output, lse = kernel(shape)(query, key, None, block_indices)
        return output[:, tokens], lse[:, tokens]

    def define(query, key):  # type: ignore[no-untyped-def]
        by_group = (1, groups.size, size)
        rows = query[:, tokens].reshape(*by_group, *query.shape[2:])
        chosen = (rows, tokens.reshape(by_group), jnp.zeros(by_group, jnp.int32))
        chosen = (*chosen, block_indices[:, groups])
        results = reference.attend_gathered(chosen, key, key[..., :128], 16, shape.head_dim**-0.5)
        return jax.tree.map(lambda x: x.reshape(1, tokens.size, *x.shape[3:]), results)

    def gradients(function, *arrays):  # type: ignore[no-untyped-def]
        results, pull = jax.vjp(function, *arrays)
        return results, pull((doutput.astype(results[0].dtype), jnp.zeros_like(results[1])))

    poison_memory()
    actual = jax.jit(functools.partial(gradients, run))(query, key)
    exact = (x.astype(jnp.float32) for x in (query, key))
    with jax.default_matmul_precision("highest"):
        desired = jax.jit(functools.partial(gradients, define))(*exact)
    chex.assert_trees_all_close(actual[0][1], desired[0][1], atol=1e-5)
    for value, wanted in zip(
        jax.tree.leaves((actual[0][0], actual[1])),
        jax.tree.leaves((desired[0][0], desired[1])),
        strict=True,
    ):
        assert relative_error(value, wanted) < 8e-3


@pytest.mark.gpu
def test_api_runs_the_kernel_by_name() -> None:
    shape = SHAPES[0]
    query, key, value, block_indices = draw(shape, 1, 256)
    call = functools.partial(
        selected_attention, query, key, value, block_indices, block_size=shape.block_size,
        queries_per_selection=shape.queries_per_selection, value_dim=shape.value_dim,
    )  # fmt: skip
    chex.assert_trees_all_equal(call(implementation="mosaic_gpu"), call())
