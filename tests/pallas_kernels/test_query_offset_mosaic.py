"""The Mosaic GPU kernels on queries that are a part of the row: lowering, numbers, a Hopper GPU."""

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases import Case, make_inputs
from pallas_kernels.compressed_attention import mosaic_gpu as compressed_kernel
from pallas_kernels.compressed_attention import reference as compressed_reference
from pallas_kernels.select_blocks import reference as select_reference
from pallas_kernels.select_blocks.scores import Tiling
from pallas_kernels.selected_attention import mosaic_gpu as selected_kernel
from pallas_kernels.selected_attention import reference as selected_reference
from pallas_kernels.sliding_window_attention import mosaic_gpu as window_kernel
from pallas_kernels.sliding_window_attention import reference as window_reference
from tests.pallas_kernels import flash_checks
from tests.pallas_kernels import test_compressed_attention_mosaic as compressed_cases
from tests.pallas_kernels import test_select_blocks_mosaic as select_cases
from tests.pallas_kernels import test_selected_attention_mosaic as selected_cases
from tests.pallas_kernels import test_sliding_window_attention_mosaic as window_cases
from tests.pallas_kernels.test_query_offset import in_parts, sparse_branches, sums

ASA = Case(
    "asa", num_tokens=16384, num_heads=16, head_dim=160, value_dim=128, shares_value=True,
    num_selected_blocks=64,
)  # fmt: skip
INTERPRET = plgpu.InterpretGPUParams()


def documents(length: int) -> jax.Array:
    """Two documents, the second at a multiple of 32, and padding."""
    row = np.zeros(length, np.int32)
    start = length // 4 // 32 * 32
    row[: start - 7], row[start : length * 4 // 5] = 1, 2
    return jnp.asarray(row)[None]


def check(
    kernel: Any,
    definition: Any,
    shapes: flash_checks.Shapes,
    value_dim: int,
    part: tuple[int, int],
    interpret: Any,
    **rest: Any,
) -> None:
    """Compares results and gradients for a part (offset, T) of a packed row, also of unseen keys.

    Args:
      kernel: Of query, key, value, the row's segment_ids, an offset, `rest` and `interpret`.
      definition: The same without `interpret`.
      shapes: Of query, key and value, for whole rows.
      value_dim: h.
      part: Position of the first query, and how many there are.
      interpret: Parameters of interpret mode.
      **rest: Arrays that both take.
    """
    offset, num_queries = part
    (batch, length, *heads), *keys = shapes

    def attend(query, key, value, row):  # type: ignore[no-untyped-def]
        return kernel(query, key, value, **row, interpret=interpret)

    def define(query, key, value, row):  # type: ignore[no-untyped-def]
        value = key[..., :value_dim] if value is None else value
        return definition(query, key, value, **row)

    row = {"segment_ids": documents(length), "query_offset": jnp.int32(offset), **rest}
    flash_checks.check_against_definition(
        attend, define, ((batch, num_queries, *heads), *keys), value_dim, row,
        repeats=not interpret,
    )  # fmt: skip


def check_window(shapes: Any, value_dim: int, window: int, part: Any, interpret: Any) -> None:
    sizes = {"window_size": window, "scale": 0.1}
    kernel = functools.partial(window_kernel.sliding_window_attention, value_dim=value_dim, **sizes)
    definition = functools.partial(window_reference.sliding_window_attention, **sizes)
    check(kernel, definition, shapes, value_dim, part, interpret)


def check_compressed(
    shapes: Any, value_dim: int, block_size: int, stride: int, part: Any, interpret: Any
) -> None:
    sizes = {"block_size": block_size, "stride": stride, "scale": 0.1}
    kernel = functools.partial(compressed_kernel.compressed_attention, value_dim=value_dim, **sizes)
    definition = functools.partial(compressed_reference.compressed_attention, **sizes)
    check(kernel, definition, shapes, value_dim, part, interpret)


def check_selected(shape: Any, length: int, part: Any, interpret: Any) -> None:
    sizes = {
        "block_size": shape.block_size,
        "queries_per_selection": shape.queries_per_selection,
        "scale": shape.head_dim**-0.5,
    }
    kernel = functools.partial(
        selected_kernel.selected_attention, value_dim=shape.value_dim, **sizes
    )
    definition = functools.partial(selected_reference.selected_attention, **sizes)
    *shapes, lists = selected_cases.array_shapes(shape, 1, length)
    num_groups, num_blocks = -(-part[1] // shape.queries_per_selection), length // shape.block_size
    lists = jax.random.randint(
        jax.random.key(6), (1, num_groups, *lists[2:]), -1, num_blocks, jnp.int32
    )
    check(kernel, definition, shapes, shape.value_dim, part, interpret, block_indices=lists)


def equal_lists(shape: Any, length: int, parts: Any, **options: Any) -> jax.Array:
    """How many lists of parts (offset, T) of a packed row are those of the definition."""
    segment_ids = documents(length)
    query, key, lse = select_cases.array_shapes(shape, length)
    query, key = (
        jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate((query, key))
    )
    lse = jnp.full(lse.shape, 8.0)
    (_, _, head_dim), (block, compressed, stride), size, step = shape

    @functools.partial(jax.jit, static_argnums=1)
    def select(offset, num_queries):  # type: ignore[no-untyped-def]
        rows, row_lse = (
            jax.lax.dynamic_slice_in_dim(x, offset, num_queries, axis=1) for x in (query, lse)
        )
        row = {"query_offset": offset, "segment_ids": segment_ids}
        got = select_cases.operation(shape, **row, **options)(rows, key, row_lse)
        exact = (x.astype(jnp.float32) for x in (rows, key))
        with jax.default_matmul_precision("highest"):
            wanted = select_reference.select_blocks(
                *exact, row_lse, size, block, compressed, stride, step, scale=head_dim**-0.5, **row
            )
        return (got == wanted).all(-1)

    equal = [select(jnp.int32(offset), num_queries).ravel() for offset, num_queries in parts]
    return jnp.concatenate(equal).mean()


def test_sparse_branches_of_a_chunk_lower_with_gradients(hopper):
    case = ASA
    inputs = jax.eval_shape(lambda: make_inputs(case, 0, jnp.bfloat16))
    query = jax.ShapeDtypeStruct((1, 2048, *inputs.query.shape[2:]), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((1, 16384), jnp.int32)

    def chunk(query, inputs, row, offset):
        function = functools.partial(
            sparse_branches, query_offset=offset, implementation="mosaic_gpu"
        )
        return sums(case, function, row)(query, inputs)

    text = flash_checks.lower_for_cuda(
        chunk, query, inputs, row, jax.ShapeDtypeStruct((), jnp.int32)
    )
    for kernel in ("compressed_attention_dkv", "select_blocks_largest", "selected_attention_dkv"):
        assert kernel in text


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compilation")
def test_interpreted_window_matches_the_definition():
    keys = (1, 128, 1, 64)
    check_window(((1, 128, 1, 64), keys, keys), 64, 40, (57, 64), INTERPRET)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compilation")
def test_interpreted_compressed_attention_matches_the_definition():
    shapes = ((1, 128, 1, 96), (1, 8, 1, 96), None)
    check_compressed(shapes, 64, 16, 16, (57, 64), INTERPRET)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compilation")
def test_interpreted_selected_attention_matches_the_definition():
    shape = selected_cases.Shape("two_heads", 1, 2, 4, 16, 64, 64, False, 3)
    check_selected(shape, 128, (48, 62), INTERPRET)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compilation")
def test_interpreted_lists_of_parts_are_those_of_the_row():
    shape = (2, 1, 32), (16, 16, 16), 4, 8
    parts = [(4096, 64), (12000, 64)]  # of 512 columns and of 1,024
    assert equal_lists(shape, 16384, parts, sizes=Tiling(2, 64), interpret=INTERPRET) == 1


LONG = 3001, (1501, 1000)  # tokens of a row; where queries start, how many there are


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mla", "gqa_64", "latent"])
@pytest.mark.parametrize("window", [100, 3001])
def test_window_on_gpu(name: str, window: int) -> None:
    length, part = LONG
    shapes, value_dim, _ = window_cases.shapes_of(name, 1, length)
    check_window(shapes, value_dim, window, part, None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", compressed_cases.SHAPES)
def test_compressed_attention_on_gpu(name: str) -> None:
    length, part = LONG
    shapes, *sizes = compressed_cases.shapes_of(name, 1, length)
    check_compressed(shapes, *sizes, part, None)


@pytest.mark.gpu
@pytest.mark.parametrize("part", [(0, 512), (1088, 900)])
@pytest.mark.parametrize("shape", selected_cases.SHAPES, ids=str)
def test_selected_attention_on_gpu(shape: Any, part: tuple[int, int]) -> None:
    check_selected(shape, 2048, part, None)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [select_cases.ASA, select_cases.NSA_16, select_cases.NSA_64, select_cases.ASA_1B]
)
def test_lists_on_gpu(shape: Any) -> None:
    parts = [(0, 1024), (4096, 1000), (14336, 2048)]
    assert equal_lists(shape, 16384, parts) > 0.998


@pytest.mark.gpu
def test_chunks_in_a_scan_equal_the_row_on_gpu():
    inputs, segment_ids = make_inputs(ASA, 0, jnp.bfloat16), documents(ASA.num_tokens)
    parts = functools.partial(in_parts, size=2048)
    chunks, whole = (
        sums(ASA, functools.partial(function, implementation="mosaic_gpu"), segment_ids)(
            inputs.query, inputs
        )
        for function in (parts, sparse_branches)
    )
    (_, (outputs, lists)), gradients = chunks
    (_, (wanted_outputs, wanted_lists)), wanted_gradients = whole
    assert (lists == wanted_lists).all(-1).mean() > 0.998
    for actual, wanted in zip(
        jax.tree.leaves((outputs, gradients)),
        jax.tree.leaves((wanted_outputs, wanted_gradients)),
        strict=True,
    ):
        assert flash_checks.relative_error(actual, wanted) < 1e-2
