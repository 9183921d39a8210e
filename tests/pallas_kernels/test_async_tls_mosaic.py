"""The Mosaic GPU kernels of AsyncTLS: lowering at the named shapes, numbers in interpret mode."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.async_tls_attention import async_tls_attention
from pallas_kernels.async_tls_attention import mosaic_gpu as attention_kernel
from pallas_kernels.async_tls_attention import reference as attention_reference
from pallas_kernels.async_tls_cases import ASYNC_TLS_CASES, METHODS
from pallas_kernels.async_tls_select_blocks import mosaic_gpu as blocks_kernel
from pallas_kernels.async_tls_select_blocks import reference as blocks_reference
from pallas_kernels.async_tls_select_tokens import mosaic_gpu as tokens_kernel
from pallas_kernels.async_tls_select_tokens import reference as tokens_reference
from pallas_kernels.async_tls_select_tokens.reference import Labels
from pallas_kernels.double_sparsity import best_of_ranges
from pallas_kernels.mosaic.largest_columns import KEPT, NEVER, largest_columns
from pallas_kernels.token_lists import list_best
from tests.pallas_kernels.decode_checks import INTERPRET, check, exact, normal

pytestmark = pytest.mark.usefixtures("fast_compilation")
GROUPED, LATENT = ASYNC_TLS_CASES
KERNELS = {
    "dense": 1, "async_tls": 6, "blocks": 2, "tokens": 3, "attention": 1, "quest": 3,
    "double_sparsity": 5, "double_sparsity_top_k": 3,
}  # fmt: skip


def abstract(case: Any, method: Any, batch: int, context: int) -> Any:
    return jax.eval_shape(lambda: case.arguments(method, batch, context))


@pytest.mark.parametrize(
    ("case", "method", "batch", "context"),
    [
        (GROUPED, "async_tls", 8, 98304),
        pytest.param(LATENT, "async_tls", 1, 98304, marks=pytest.mark.slow),
        pytest.param(GROUPED, "double_sparsity", 8, 98304, marks=pytest.mark.slow),
        *(
            pytest.param(case, method, batch, context, marks=pytest.mark.slow)
            for case in ASYNC_TLS_CASES
            for method in METHODS
            for batch, context in ((1, 32768), (8, 131072))
        ),
    ],
    ids=str,
)
def test_lowers_for_cuda(case, method, batch, context, hopper):
    arguments = abstract(case, method, batch, context)
    traced = jax.jit(lambda x: case.run(method, x, "mosaic_gpu")).trace(arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == KERNELS[method]


@pytest.mark.parametrize(
    ("change", "method", "context", "message"),
    [
        ({"width": 96}, "blocks", 8192, None),
        ({"width": 100}, "blocks", 8192, "bounds: 200 numbers"),
        ({}, "blocks", 2048, "bounds: 32 blocks"),
        ({"block_size": 32}, "tokens", 8192, "block_size: 32"),
        ({"num_channels": 8}, "tokens", 8192, "labels: 8 channels"),
        ({"num_blocks": 300}, "tokens", 8192, "block_indices: 19392 tokens"),
        ({"width": 96}, "attention", 8192, "value: 96/96"),
        ({"num_heads": 520}, "attention", 8192, "query: 65 heads"),
        ({}, "double_sparsity", 64 * 511, "32704 tokens cannot be cut"),
    ],
)
def test_says_what_it_does_not_take(change, method, context, message, hopper):
    case = dataclasses.replace(GROUPED, **change)
    arguments = abstract(case, method, 1, context)
    if message is None:
        jax.eval_shape(lambda x: case.run(method, x, "mosaic_gpu"), arguments)
        return
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda x: case.run(method, x, "mosaic_gpu"), arguments)


def test_programs_read_the_most_blocks_with_which_all_multiprocessors_are_busy():
    for num_rows in (1, 8, 64, 300):
        for num_listed in (8, 131, 1536):
            split = tokens_kernel.split_of(num_rows, num_listed)
            assert split.count * split.each >= num_listed
            assert split.count * split.each % 8 == 0
            enough = num_rows * split.count >= tokens_kernel.PROGRAMS
            assert enough or split.each == 1
    assert tokens_kernel.split_of(64, 131).each > 1


def test_order_of_bounds_is_kept_by_their_bits():
    scores = np.array([-np.inf, -2e38, -1e38, -3.0, -1e-40, -0.0, 0.0, 1e-40, 2.5, 2.6, 3e38])
    mapped = np.asarray(blocks_kernel.ordered(jnp.asarray(scores, jnp.float32)))
    bits = mapped.view(np.int32)  # a comparison of floats would take the smallest for zeros
    assert (np.diff(bits.astype(np.int64)) >= 0).all() and (bits >= 0).all()
    assert bits[3] < bits[4] < bits[8] < bits[9] and mapped[-1] < KEPT


def rows_of_scores(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Scores with ties, columns that do not compete and some that are kept."""
    scores = random.integers(0, 50, shape).astype(np.float32) / 8
    scores[random.random(shape) < 0.1] = NEVER
    scores[..., ::200] = KEPT
    scores[0, 0, 100:] = NEVER
    return scores


def wanted_columns(scores: np.ndarray, size: int, max_kept: int) -> jax.Array:
    competing = np.where((scores >= 0) & (scores < KEPT), scores, -np.inf)
    return list_best(jnp.asarray(competing), jnp.asarray(scores == KEPT), size, max_kept)


def test_interpreted_lists_are_those_of_the_largest():
    scores = rows_of_scores(np.random.default_rng(0), 1, 2, 512)
    scores[..., 500:] = np.nan  # behind the columns that there are
    wanted = wanted_columns(scores[..., :500], 120, 3)
    places = np.random.default_rng(1).permutation(64)[:63].astype(np.int32)
    actual = largest_columns(
        jnp.asarray(scores), jnp.broadcast_to(places, (1, 2, 63)), num_columns=500, size=120,
        max_kept=3, block_size=8, interpret=INTERPRET,
    )  # fmt: skip
    listed = places[np.maximum(wanted, 0) // 8] * 8 + wanted % 8
    chex.assert_trees_all_equal(actual, jnp.where(wanted >= 0, listed, -1))


def test_interpreted_blocks_match_the_definition():
    random = np.random.default_rng(2)
    query = jnp.asarray(random.integers(-3, 4, (2, 6, 32)), jnp.bfloat16)
    bounds = jnp.asarray(random.integers(-3, 4, (2, 2, 72, 64)), jnp.bfloat16)
    rest = jnp.array([72 * 4 - 1, 30]), 8, 4
    chex.assert_trees_all_equal(
        blocks_kernel.async_tls_select_blocks(query, bounds, *rest, interpret=INTERPRET),
        blocks_reference.async_tls_select_blocks(query, bounds, *rest),
    )


def test_interpreted_tokens_match_the_definition():
    random = np.random.default_rng(3)
    tokens = (2, 1, 512)
    query = jnp.asarray(random.standard_normal((2, 3, 32)), jnp.bfloat16)
    labels = Labels(
        jnp.asarray(random.integers(0, 256, (*tokens, 16)), jnp.uint8),
        jnp.asarray(random.uniform(0.05, 0.1, tokens), jnp.float16),
        jnp.asarray(random.uniform(-0.5, 0.5, tokens), jnp.float16),
    )
    blocks = jnp.array([[[0, 2, 3, 6, 7]], [[0, 1, 2, -1, -1]]])
    places = jnp.array([[[9, 4, 0, 2, 30]], [[5, 1, 8, -1, -1]]])
    rest = labels, blocks, jnp.array([512 - 5, 130]), 32, 64, 0.3, places
    actual = tokens_kernel.async_tls_select_tokens(query, *rest, each=4, interpret=INTERPRET)
    query = query.astype(jnp.float32)
    wanted = tokens_reference.async_tls_select_tokens(query, *rest)
    chex.assert_trees_all_equal(actual, wanted)


@pytest.mark.parametrize("latents", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_interpreted_attention_to_keys_and_values_of_one_array_is_that_to_two(latents):
    head_dim, columns = (576, (0, 512)) if latents else (64, (64, 128))
    query, packed = normal(0, 2, 3, head_dim), normal(1, 2, 200, 1, 576 if latents else 128)
    positions = jax.random.randint(jax.random.key(4), (2, 1, 100), -1, 200)
    actual = attention_kernel.async_tls_attention(
        query, packed, None, positions, None, 0.1, columns, splits=2, interpret=INTERPRET
    )
    query, packed = exact(query, packed)
    if latents:
        parts = packed[..., :512], None, positions, packed[:, :, 0, 512:]
    else:
        parts = packed[..., :64], packed[..., 64:], positions, None
    wanted = attention_reference.async_tls_attention(query, *parts, 0.1)
    check(actual, wanted)
    chex.assert_trees_all_close(
        attention_reference.async_tls_attention(query, packed, None, positions, None, 0.1, columns),
        wanted,
    )


@pytest.mark.parametrize(
    ("shape", "length", "splits"),
    [
        ((2, 1, 64, 64, 0), 170, 2),  # the second split has one tile of two, with places to spare
        pytest.param((4, 2, 64, 64, 0), 330, 1, marks=pytest.mark.slow),  # slots used again
        pytest.param((3, 1, 512, 0, 64), 130, 1, marks=pytest.mark.slow),  # two warpgroups
    ],
    ids=str,
)
def test_interpreted_attention_matches_the_definition(shape, length, splits):
    num_heads, num_kv_heads, width, value_dim, rope_dim = shape
    query, key = normal(0, 2, num_heads, width + rope_dim), normal(1, 2, 200, num_kv_heads, width)
    value = normal(2, *key.shape[:3], value_dim) if value_dim else None
    rope_key = normal(3, 2, 200, rope_dim) if rope_dim else None
    positions = jax.random.randint(jax.random.key(4), (2, num_kv_heads, length), -1, 200)
    positions = positions.at[1, 0].set(-1)
    key = key.at[0, 0].set(jnp.nan)  # what is not listed does not count
    positions = jnp.where(positions == 0, -1, positions)
    actual = attention_kernel.async_tls_attention(
        query, key, value, positions, rope_key, 0.1, splits=splits, interpret=INTERPRET
    )
    query, key, value, rope_key = exact(query, key, value, rope_key)
    call = query, key, value, positions, rope_key, 0.1
    check(actual, attention_reference.async_tls_attention(*call))


@pytest.mark.parametrize(
    ("head_dim", "width", "value_columns", "message"),
    [
        (128, 256, (64, 192), "neither behind a key of 128 numbers nor its first"),
        (128, 260, (132, 260), "260 numbers with values from 132 on"),
        (96, 224, (96, 224), "value: 96/128 are not"),
        (576, 576, (0, 500), "key: 500 numbers"),
    ],
)
def test_says_which_arrays_of_keys_and_values_it_does_not_take(
    head_dim, width, value_columns, message, hopper
):
    query, packed = (
        jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 8, head_dim), (1, 512, 1, width))
    )
    positions = jax.ShapeDtypeStruct((1, 1, 192), jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(
            lambda q, k, p: async_tls_attention(
                q, k, None, p, value_columns=value_columns, implementation="mosaic_gpu"
            ), query, packed, positions,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("head_dim", "width", "value_columns"), [(128, 256, (128, 256)), (576, 576, (0, 512))]
)
def test_keys_and_values_of_one_array_lower_for_cuda(head_dim, width, value_columns, hopper):
    arrays = (
        jax.ShapeDtypeStruct((16, 4, head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((16, 16768, 1, width), jnp.bfloat16),
    )
    positions = jax.ShapeDtypeStruct((16, 1, 1216), jnp.int32)
    traced = jax.jit(
        lambda q, k, p: async_tls_attention(q, k, None, p, value_columns=value_columns)
    ).trace(*arrays, positions)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("columns", "size", "max_kept"), [(512, 128, 3), (2048, 128, 12), (8704, 1024, 50),
                                      (9728, 2048, 50), (16384, 512, 90)]
)  # fmt: skip
def test_lists_are_those_of_the_largest(columns, size, max_kept):
    random = np.random.default_rng(columns)
    scores = rows_of_scores(random, 2, 3, columns)
    scores[1, 1] = random.random(columns, np.float32)
    wanted = wanted_columns(scores[..., : columns - 7], size, max_kept)
    places = np.sort(random.permutation(columns)[: columns // 64]).astype(np.int32)
    for given, listed in (
        (None, np.asarray(wanted)),
        (
            jnp.broadcast_to(places, (2, 3, places.size)),
            places[np.maximum(wanted, 0) // 64] * 64 + np.asarray(wanted) % 64,
        ),
    ):
        actual = largest_columns(
            jnp.asarray(scores), given, num_columns=columns - 7, size=size, max_kept=max_kept,
            block_size=64, interpret=None,
        )  # fmt: skip
        chex.assert_trees_all_equal(actual, jnp.where(wanted >= 0, listed, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [32768, 98304, 131072])
def test_best_of_ranges_are_the_best_of_all(columns):
    scores = np.random.default_rng(columns).random((2, 2, columns), np.float32)
    scores[..., :64] = scores[..., -128:] = KEPT
    actual = best_of_ranges(jnp.asarray(scores), columns, 1024, 192)
    chex.assert_trees_all_equal(actual, wanted_columns(scores, 1024, 192))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ASYNC_TLS_CASES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("batch", "context"), [(1, 98304), (5, 8192)])
def test_kernels_match_the_definition(case, method, batch, context):
    arrays = case.arguments(method, batch, context)
    if method != "double_sparsity_top_k":
        arrays["lengths"] = arrays["lengths"] - jnp.arange(batch) * (context // 7)
    actual = jax.jit(lambda x: case.run(method, x, "mosaic_gpu"))(arrays)

    def widen(x):
        return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda x: case.run(method, x, "xla"))(jax.tree.map(widen, arrays))
    if method in ("dense", "attention"):
        return check(actual, wanted)
    if method in ("blocks", "tokens"):
        # Sums in another order exchange what is almost equal.
        share = jax.vmap(jax.vmap(jnp.isin))(actual, wanted).mean()
        assert share > 0.98
        return None
    # What is exchanged weighs as much, almost, but its values are others.
    error = jnp.linalg.norm((actual[0] - wanted[0]).ravel())
    assert error < 0.1 * jnp.linalg.norm(wanted[0].ravel())


@pytest.mark.gpu
@pytest.mark.parametrize("case", ASYNC_TLS_CASES, ids=str)
def test_kernel_reads_keys_and_values_of_one_array(case):
    """As a pool of blocks has them: rows of key heads, slots in the place of blocks."""
    rows, slots = 3 * case.num_kv_heads, 262
    columns = (case.width, 2 * case.width) if case.has_value else (0, case.width)
    query = normal(0, rows, case.num_heads // case.num_kv_heads, case.head_dim)
    packed = normal(1, rows, slots * case.block_size, 1, max(columns[1], case.head_dim))
    positions = jax.random.randint(
        jax.random.key(2), (rows, 1, case.num_attended), -1, packed.shape[1]
    )

    def attend(implementation, *arrays):
        return jax.jit(
            lambda q, k, p: async_tls_attention(
                q, k, None, p, value_columns=columns, scale=case.scale,
                implementation=implementation,
            )
        )(*arrays, positions)  # fmt: skip

    actual = attend("mosaic_gpu", query, packed)
    with jax.default_matmul_precision("highest"):
        check(actual, attend("xla", *exact(query, packed)))
