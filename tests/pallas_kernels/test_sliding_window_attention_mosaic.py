"""The Mosaic GPU kernels of sliding_window_attention: lowering, numbers against the reference."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from pallas_kernels.sliding_window_attention import (
    mosaic_gpu,
    reference,
    sliding_window_attention,
)
from tests.pallas_kernels import flash_checks

# name: query heads, key heads, key and value head dims (0: the value is in the key), window
SHAPES = {
    "mla": (16, 16, 96, 64, 512),
    "gqa_64": (16, 4, 64, 64, 512),
    "gqa_128": (64, 4, 128, 128, 100),
    "one_key_head_192": (8, 1, 192, 128, 700),
    "multi_head_192": (4, 4, 192, 128, 1),
    "latent": (16, 2, 160, 0, 512),
    "wide_latent": (16, 2, 320, 0, 512),
}
VALUE_DIMS = {"latent": 128, "wide_latent": 256}  # of values in the key


def shapes_of(name: str, batch: int, length: int) -> tuple[flash_checks.Shapes, int, int]:
    """Returns shapes of query, key and value; value_dim; window."""
    num_heads, num_kv_heads, head_dim, value_dim, window = SHAPES[name]
    value = (batch, length, num_kv_heads, value_dim) if value_dim else None
    query, key = ((batch, length, heads, head_dim) for heads in (num_heads, num_kv_heads))
    return (query, key, value), value_dim or VALUE_DIMS[name], window


def kernel(window: int, value_dim: int, interpret: Any = None) -> flash_checks.Attend:
    def attend(query, key, value, segment_ids=None):  # type: ignore[no-untyped-def]
        return mosaic_gpu.sliding_window_attention(
            query, key, value, window, value_dim, segment_ids, 0.1, interpret=interpret
        )

    return attend


def definition(window: int, value_dim: int) -> flash_checks.Attend:
    def attend(query, key, value, segment_ids=None):  # type: ignore[no-untyped-def]
        value = key[..., :value_dim] if value is None else value
        return reference.sliding_window_attention(query, key, value, window, segment_ids, 0.1)

    return attend


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("mla", False),
        ("gqa_64", True),
        ("gqa_128", False),
        ("one_key_head_192", True),
        ("multi_head_192", False),
        ("latent", True),
        ("wide_latent", True),
    ],
)
def test_lowers_with_gradients(name: str, packed: bool) -> None:
    shapes, value_dim, window = shapes_of(name, 2, 1000)
    text = flash_checks.lower_gradient(kernel(window, value_dim), shapes, packed)
    assert text.count("@mosaic_gpu") == 3
    for part in ("forward", "dq", "dkv"):
        assert f"sliding_window_attention_{part}" in text  # names of the kernels, for profiles


@pytest.mark.parametrize("length", [1, 65, 1_048_576])
def test_forward_lowers_for_any_length(length: int) -> None:
    shapes, value_dim, window = shapes_of("mla", 1, length)
    arrays = flash_checks.abstract(shapes)
    assert "@mosaic_gpu" in flash_checks.lower_for_cuda(kernel(window, value_dim), *arrays)


@pytest.mark.slow
def test_lowers_under_transformations() -> None:
    shapes, value_dim, window = shapes_of("gqa_64", 1, 256)
    assert "@mosaic_gpu" in flash_checks.lower_transformed(kernel(window, value_dim), shapes)


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "dtype", "message"),
    [
        (72, 64, jnp.bfloat16, "key: head dim 72"),
        (256, 64, jnp.bfloat16, "key: head dim 256"),
        (64, 256, jnp.bfloat16, "value: head dim 256"),
        (64, 64, jnp.float32, "query: float32"),
        (128, 96, jnp.bfloat16, "96 of 128"),
    ],
)
def test_says_what_it_does_not_take(
    head_dim: int, value_dim: int, dtype: Any, message: str
) -> None:
    key = (1, 64, 2, head_dim)
    shapes = (key, key, None if "of" in message else (1, 64, 2, value_dim))
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(kernel(8, value_dim), *flash_checks.abstract(shapes, dtype))


@pytest.mark.slow
def test_interpreted_matches_the_definition() -> None:
    shapes = ((1, 128, 2, 96), (1, 128, 1, 96), (1, 128, 1, 64))
    attend = kernel(40, 64, plgpu.InterpretGPUParams())
    row = flash_checks.packed_row(128)
    flash_checks.check_against_definition(attend, definition(40, 64), shapes, 64, row)


def chosen(window: int, value_dim: int) -> flash_checks.Attend:
    """Returns the operation as its users call it."""

    def attend(query, key, value, segment_ids=None):  # type: ignore[no-untyped-def]
        return sliding_window_attention(
            query, key, value, window_size=window, value_dim=value_dim, segment_ids=segment_ids,
            scale=0.1, implementation="mosaic_gpu",
        )  # fmt: skip

    return attend


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1024, 1111])
@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_definition(name: str, length: int, packed: bool) -> None:
    shapes, value_dim, window = shapes_of(name, 1, length)
    segment_ids = flash_checks.packed_row(length) if packed else None
    flash_checks.check_against_definition(
        chosen(window, value_dim), definition(window, value_dim), shapes, value_dim, segment_ids,
        repeats=True,
    )  # fmt: skip


@pytest.mark.gpu
def test_matches_the_definition_at_16384() -> None:
    shapes, value_dim, window = shapes_of("mla", 1, 16384)
    flash_checks.check_against_definition(
        chosen(window, value_dim), definition(window, value_dim), shapes, value_dim
    )


@pytest.mark.gpu
@pytest.mark.parametrize("length", [65536, 262_144, 1_048_576])
def test_spots_of_long_rows(length: int) -> None:
    shapes, value_dim, window = shapes_of("mla", 1, length)

    def sees(token, key):  # type: ignore[no-untyped-def]
        return (key <= token) & (key > token - window)

    flash_checks.check_spots(
        chosen(window, value_dim), sees, shapes, value_dim, 0.1, gradients=length == 65536
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mla", "gqa_64"])
def test_transformations_change_nothing(name: str) -> None:
    shapes, value_dim, window = shapes_of(name, 1, 2048)
    flash_checks.check_transformed(chosen(window, value_dim), shapes)
