"""decode_linear: the definition, the kernel in interpret mode and lowered, and on a GPU."""

from typing import Any

import chex
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.decode_linear import decode_linear, mosaic_gpu, reference

INTERPRET = plgpu.InterpretGPUParams()
BFLOAT16 = jnp.bfloat16

# Rows, numbers of a row, features of the weight, norm, residual, gated.
Case = tuple[int, int, int, bool, bool, bool]
# Tiles for some warpgroups and not for others; more than there are slots; rows to pad.
SMALL_CASES: list[Case] = [
    (3, 320, 64, True, False, False),
    (12, 128, 64, True, True, True),
    (8, 2304, 32, False, True, False),
]
# Products of asa_340m, asa_1b and full_1b; the last is the narrowest that there is.
MODEL_CASES: list[Case] = [
    (8, 1024, 1824, True, False, False),
    (64, 1024, 1856, True, False, False),
    (8, 1024, 5248, True, False, True),
    (64, 2048, 11264, True, False, True),
    (32, 2624, 1024, False, True, False),
    (64, 5632, 2048, False, True, False),
    (1, 64, 32, True, True, False),
]


def draw(case: Case, dtype: Any) -> tuple[Any, ...]:
    rows, size, features, norm, residual, gated = case
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), dtype)

    return (
        3 * normal(rows, size),  # of a mean square that the norm has to see
        normal(size, features) / size**0.5,
        jnp.asarray(1 + random.random(size), jnp.float32) if norm else None,
        normal(rows, features // (1 + gated)) if residual else None,
    )


def check(got: jax.Array, case: Case, arrays: tuple[Any, ...]) -> None:
    """Is it the definition in float32, to rounding?"""
    exact = [None if a is None else a.astype(jnp.float32) for a in arrays]
    with jax.default_matmul_precision("highest"):
        (want,) = reference.decode_linear(*exact, 1e-6, case[-1], (got.shape[1],))
    chex.assert_type(got, arrays[0].dtype)
    error = jnp.abs(got.astype(jnp.float32) - want).max() / jnp.abs(want).max()
    assert error < 8e-3, error


@pytest.mark.parametrize("case", SMALL_CASES[:2], ids=str)
def test_definition(case):
    x, weight, norm_scale, residual = draw(case, jnp.float32)
    features = weight.shape[1] // (1 + case[-1])
    parts = decode_linear(
        x, weight, norm_scale=norm_scale, residual=residual, epsilon=0.5, gated=case[-1],
        widths=[5, features - 5],
    )  # fmt: skip
    assert [part.shape[1] for part in parts] == [5, features - 5]
    got = jnp.concatenate(parts, axis=1)
    x, weight, norm_scale = (np.asarray(a, np.float64) for a in (x, weight, norm_scale))
    want = x / np.sqrt((x**2).mean(1, keepdims=True) + 0.5) * norm_scale @ weight
    if case[-1]:
        gate, up = np.split(want, 2, axis=1)
        want = gate / (1 + np.exp(-gate)) * up
    want = want if residual is None else want + residual
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_kernel_is_definition(case):
    arrays = draw(case, BFLOAT16)
    features = arrays[1].shape[1] // (1 + case[-1])
    widths = (32,) * (features // 32)
    parts = mosaic_gpu.decode_linear(*arrays, 1e-6, case[-1], widths, interpret=INTERPRET)
    check(jnp.concatenate(parts, axis=1), case, arrays)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(dispatch, "is_hopper", lambda: True)


def run(case: Case, arrays: tuple[Any, ...]) -> jax.Array:
    x, weight, norm_scale, residual = arrays
    features = weight.shape[1] // (1 + case[-1])
    parts = decode_linear(
        x, weight, norm_scale=norm_scale, residual=residual, gated=case[-1],
        widths=[features] if features == 32 else [features - 32, 32],
        implementation="mosaic_gpu",
    )  # fmt: skip
    return jnp.concatenate(parts, axis=1)


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_lowers_for_cuda(case, hopper):
    arrays = jax.eval_shape(lambda: draw(case, BFLOAT16))
    traced = jax.jit(lambda arrays: run(case, arrays)).trace(arrays)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        ((8, 64, 32, True, True, False), jnp.float32, "x: float32"),
        ((65, 64, 32, True, True, False), BFLOAT16, "x: 65 rows"),
        ((8, 96, 32, True, True, False), BFLOAT16, "x: 96 numbers"),
        ((8, 64, 96, True, True, True), BFLOAT16, r"weight: \(16, 32\) features"),
    ],
    ids=lambda value: str(value),
)
def test_says_what_the_kernel_does_not_take(case, dtype, message, hopper):
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda: run(case, draw(case, dtype)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 3, 4))}, r"x: expected \[B, D\]"),
        ({"weight": jnp.ones((5, 6))}, r"weight: expected shape \[4, 6\]"),
        ({"weight": jnp.ones((4, 6), BFLOAT16)}, "weight: expected float32"),
        ({"weight": jnp.ones((4, 5)), "gated": True}, "5 features have no halves"),
        ({"norm_scale": jnp.ones(3)}, r"norm_scale: expected shape \[4\]"),
        ({"widths": [2, 3]}, r"widths: \[2, 3\] are 5 together, not 6"),
        ({"residual": jnp.ones((2, 6)), "gated": True}, r"residual: expected shape \[2, 3\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"x": jnp.ones((2, 4)), "weight": jnp.ones((4, 6)), **change}
    with pytest.raises(ValueError, match=message):
        decode_linear(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not dispatch.is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("case", [*SMALL_CASES, *MODEL_CASES], ids=str)
def test_on_a_gpu(case):
    arrays = draw(case, BFLOAT16)
    got = jax.jit(lambda arrays: run(case, arrays))(arrays)
    check(got, case, arrays)
    chex.assert_trees_all_equal(got, jax.jit(lambda arrays: run(case, arrays))(arrays))
