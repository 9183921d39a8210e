"""The Mosaic GPU kernels of compressed_attention: lowering, numbers against the reference."""

from typing import Any

import chex
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from pallas_kernels.blocks import number_of_blocks
from pallas_kernels.compressed_attention import compressed_attention, mosaic_gpu, reference
from tests.pallas_kernels import flash_checks

# name: query heads, key heads, key and value head dims (0: the value is in the key), block, stride
SHAPES = {
    "asa": (16, 2, 160, 0, 16, 16),
    "asa_1b": (16, 2, 320, 0, 16, 16),
    "nsa_64": (16, 4, 64, 64, 32, 16),
    "nsa_128": (64, 4, 128, 128, 32, 16),
    "one_group": (16, 1, 128, 128, 32, 16),
}
VALUE_DIMS = {"asa": 128, "asa_1b": 256}  # of values in the key


def shapes_of(name: str, batch: int, length: int) -> tuple[flash_checks.Shapes, int, int, int]:
    """Returns shapes of query, key and value; value_dim; block size; stride."""
    num_heads, num_kv_heads, head_dim, value_dim, block_size, stride = SHAPES[name]
    num_blocks = number_of_blocks(length, block_size, stride)
    key = (batch, num_blocks, num_kv_heads, head_dim)
    value = (batch, num_blocks, num_kv_heads, value_dim) if value_dim else None
    shapes = ((batch, length, num_heads, head_dim), key, value)
    return shapes, value_dim or VALUE_DIMS[name], block_size, stride


def kernel(
    value_dim: int, block_size: int, stride: int, interpret: Any = None
) -> flash_checks.Attend:
    def attend(query, key, value, segment_ids=None):  # type: ignore[no-untyped-def]
        return mosaic_gpu.compressed_attention(
            query, key, value, block_size, stride, value_dim, segment_ids, 0.1, interpret=interpret
        )

    return attend


def definition(value_dim: int, block_size: int, stride: int) -> flash_checks.Attend:
    def attend(query, key, value, segment_ids=None):  # type: ignore[no-untyped-def]
        value = key[..., :value_dim] if value is None else value
        return reference.compressed_attention(
            query, key, value, block_size, stride, segment_ids, 0.1
        )

    return attend


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("asa", False),
        ("asa", True),
        ("asa_1b", False),
        ("asa_1b", True),
        ("nsa_64", True),
        ("nsa_128", False),
        ("one_group", True),
    ],
)
def test_lowers_with_gradients(name: str, packed: bool) -> None:
    shapes, *sizes = shapes_of(name, 2, 2000)
    text = flash_checks.lower_gradient(kernel(*sizes), shapes, packed)
    assert text.count("@mosaic_gpu") == 3
    for part in ("forward", "dq", "dkv"):
        assert f"compressed_attention_{part}" in text  # names of the kernels, for profiles


@pytest.mark.parametrize("length", [65, 1_048_576])
def test_forward_lowers_for_any_length(length: int) -> None:
    shapes, *sizes = shapes_of("asa", 1, length)
    arrays = flash_checks.abstract(shapes)
    assert "@mosaic_gpu" in flash_checks.lower_for_cuda(kernel(*sizes), *arrays)


def test_no_block_gives_zero() -> None:
    shapes, *sizes = shapes_of("asa", 1, 10)
    query, key = (jnp.ones(shape, jnp.bfloat16) for shape in shapes[:2] if shape)
    output, lse = kernel(*sizes)(query, key, None)
    chex.assert_trees_all_equal(output, jnp.zeros((1, 10, 16, VALUE_DIMS["asa"]), jnp.bfloat16))
    chex.assert_trees_all_equal(lse, jnp.full((1, 10, 16), -jnp.inf))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "block_size"), [(64, 64, 32), (160, 128, 16), (320, 256, 16)]
)
def test_interpreted_matches_the_definition(head_dim: int, value_dim: int, block_size: int) -> None:
    shares_value = head_dim > value_dim
    key = (1, number_of_blocks(128, block_size, 16), 1)
    value = None if shares_value else (*key, value_dim)
    shapes = ((1, 128, 2, head_dim), (*key, head_dim), value)
    sizes = (value_dim, block_size, 16)
    attend = kernel(*sizes, plgpu.InterpretGPUParams())
    row = flash_checks.packed_row(128)
    flash_checks.check_against_definition(attend, definition(*sizes), shapes, value_dim, row)


@pytest.mark.slow
def test_lowers_under_transformations() -> None:
    shapes, *sizes = shapes_of("asa", 1, 1024)
    assert "@mosaic_gpu" in flash_checks.lower_transformed(kernel(*sizes), shapes)


def chosen(value_dim: int, block_size: int, stride: int) -> flash_checks.Attend:
    """Returns the operation as its users call it."""

    def attend(query, key, value, segment_ids=None):  # type: ignore[no-untyped-def]
        return compressed_attention(
            query, key, value, block_size=block_size, stride=stride, value_dim=value_dim,
            segment_ids=segment_ids, scale=0.1, implementation="mosaic_gpu",
        )  # fmt: skip

    return attend


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1024, 3001])
@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_definition(name: str, length: int, packed: bool) -> None:
    shapes, *sizes = shapes_of(name, 1, length)
    segment_ids = flash_checks.packed_row(length) if packed else None
    flash_checks.check_against_definition(
        chosen(*sizes), definition(*sizes), shapes, sizes[0], segment_ids, repeats=True
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["asa", "nsa_64"])
def test_matches_the_definition_at_16384(name: str) -> None:
    shapes, *sizes = shapes_of(name, 1, 16384)
    flash_checks.check_against_definition(chosen(*sizes), definition(*sizes), shapes, sizes[0])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "length"),
    [("asa", 65536), ("nsa_128", 65536), ("asa", 262_144), ("asa", 1_048_576)],
)
def test_spots_of_long_rows(name: str, length: int) -> None:
    shapes, *sizes = shapes_of(name, 1, length)
    _, block_size, stride = sizes

    def sees(token, key):  # type: ignore[no-untyped-def]
        return stride * key + block_size - 1 <= token

    flash_checks.check_spots(chosen(*sizes), sees, shapes, sizes[0], 0.1, gradients=length == 65536)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["asa", "nsa_64"])
def test_transformations_change_nothing(name: str) -> None:
    shapes, *sizes = shapes_of(name, 1, 2048)
    flash_checks.check_transformed(chosen(*sizes), shapes)
