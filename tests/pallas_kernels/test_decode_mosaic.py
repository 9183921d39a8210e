"""The Mosaic GPU kernels of decoding: lowering at every named shape, numbers in interpret mode."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention import mosaic_gpu as dense_kernel
from pallas_kernels.decode_attention import reference as dense_reference
from pallas_kernels.decode_cases import DECODE_CASES, DecodeCase
from pallas_kernels.decode_select_blocks import mosaic_gpu as select_kernel
from pallas_kernels.decode_select_blocks import reference as select_reference
from pallas_kernels.decode_selected_attention import mosaic_gpu as selected_kernel
from pallas_kernels.decode_selected_attention import reference as selected_reference
from pallas_kernels.mosaic import decode
from pallas_kernels.mosaic.decode_walk import MULTIPROCESSORS, num_splits
from tests.pallas_kernels.decode_checks import INTERPRET, check, exact, normal

BY_NAME = {case.name: case for case in DECODE_CASES}
LATENT = BY_NAME["dense, 16 on 288/256"]


def lower_for_cuda(function: Any, *arguments: Any) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def kernel(case: DecodeCase) -> Any:
    return lambda arrays: case.run(arrays, "mosaic_gpu")


def abstract(case: DecodeCase, batch: int, context: int) -> Any:
    return jax.eval_shape(lambda: case.arguments(batch, context))


@pytest.mark.parametrize("case", [c for c in DECODE_CASES if c.starts_list], ids=str)
def test_lowers_for_cuda(case, hopper):
    text = lower_for_cuda(kernel(case), abstract(case, 8, 65536))
    assert text.count("@mosaic_gpu") == (2 if case.op == "lists" else 1)


@pytest.mark.parametrize(
    ("name", "batch", "context"),
    [
        (LATENT.name, 1, 2**20),
        (LATENT.name, 128, 2**18),
        (LATENT.name, 3, 72),
        ("lists, 16/2 on 160/128", 1, 2**20),
        ("lists, 16/4 x 64, blocks of 64", 1, 1500),
        ("selected, 16/4 x 64", 2, 100),
    ],
)
def test_lowers_for_any_length_and_batch(name, batch, context, hopper):
    case = BY_NAME[name]
    assert "@mosaic_gpu" in lower_for_cuda(kernel(case), abstract(case, batch, context))


def test_lowers_under_scan_vmap_and_shard_map(hopper):
    case = BY_NAME["selected, 16/2 on 160/128"]
    arrays = abstract(case, 2, 1024)

    def scanned(arrays):
        def step(query, _):
            output, _ = kernel(case)({**arrays, "query": query})
            return query.at[..., : output.shape[-1]].add(output), None

        return jax.lax.scan(step, arrays["query"], None, length=2)[0]

    def sharded(arrays):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("data")
        return jax.shard_map(
            kernel(case), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )(arrays)

    more = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), arrays)
    for function, given in ((scanned, arrays), (sharded, arrays), (jax.vmap(kernel(case)), more)):
        assert "@mosaic_gpu" in lower_for_cuda(function, given)


@pytest.mark.parametrize(
    ("change", "context", "message"),
    [
        ({"width": 96}, 64, "key: 96 numbers"),
        ({"width": 96, "has_value": True, "rope_dim": 0}, 64, "value: 96/96"),
        ({"rope_dim": 48}, 64, "rope_key: 48"),
        ({"num_heads": 65}, 64, "query: 65 heads"),
        ({}, 56, "key: 56 tokens"),
        ({"op": "selected", "block_size": 8}, 64, "block_size: 8"),
        ({"op": "lists", "num_selected_blocks": 129}, 1024, "block_indices: 129"),
        ({"op": "lists", "compression_block_size": 64}, 1088, "compression_block_size 64"),
    ],
)
def test_says_what_it_does_not_take(change, context, message, hopper):
    case = dataclasses.replace(LATENT, **change)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(kernel(case), abstract(case, 1, context))


def test_splits_fill_the_device_once_or_balance_many():
    resident = 2 * MULTIPROCESSORS
    for num_programs in (1, 2, 4, 8, 32, 128, 512):
        for num_tiles in (1, 8, 64, 4096):
            splits = num_splits(num_programs, num_tiles, resident)
            assert 1 <= splits <= num_tiles
            each = -(-num_tiles // splits)
            waves = -(-num_programs * splits // resident)
            at_best = num_programs * num_tiles / resident
            assert waves * each <= 1.25 * at_best + 8  # tiles that a multiprocessor works on
    assert num_splits(1, 4096, resident) == 4096 // 16
    assert num_splits(512, 64, resident) < 4


@pytest.mark.parametrize("few_splits", [0, decode.FEW_SPLITS])
def test_merge_is_attention_to_all_splits(few_splits, monkeypatch):
    monkeypatch.setattr(decode, "FEW_SPLITS", few_splits)
    random = np.random.default_rng(0)
    scores = random.standard_normal((2, 3, 5, 8, 20), np.float32)  # [B, K, splits, G, keys]
    values = random.standard_normal((2, 3, 5, 20, 6), np.float32)
    scores[0, 0, 1:3] = -np.inf
    scores[1, 1] = -np.inf
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = np.exp(scores - np.where(np.isfinite(lse), lse, 0)[..., None])
    outputs = np.einsum("bksgn,bksnh->bksgh", weights, values)
    in_parts = outputs.reshape(*outputs.shape[:4], 2, 3).swapaxes(3, 4)
    output, total = decode.merge(in_parts, lse * np.log2(np.e), 12)
    scores = scores[:, :, :, :4].swapaxes(2, 3).reshape(2, 12, 100)
    wanted = jax.nn.logsumexp(scores, axis=-1)
    weights = np.exp(scores - np.where(np.isfinite(wanted), wanted, 0)[..., None])
    values = values.reshape(2, 3, 1, 100, 6).repeat(4, axis=2).reshape(2, 12, 100, 6)
    chex.assert_trees_all_close(total, wanted, atol=1e-5)
    chex.assert_trees_all_close(output, np.einsum("bns,bnsh->bnh", weights, values), atol=1e-5)
    assert not output[1, 4:8].any()


@pytest.mark.parametrize(
    ("shape", "lengths", "splits"),
    [
        # One head a key head; the second tile starts before its place; the second split of a short
        # row and all of an empty one have no keys.
        ((2, 2, 64, 64, 0), (72, 1, 0), 2),
        pytest.param((20, 1, 512, 0, 64), (72,), 1, marks=pytest.mark.slow),  # two warpgroups
        pytest.param((16, 2, 256, 0, 64), (330,), 1, marks=pytest.mark.slow),  # slots used again
    ],
    ids=str,
)
def test_interpreted_attention_matches_the_definition(shape, lengths, splits):
    num_heads, num_kv_heads, width, value_dim, rope_dim = shape
    batch, num_keys = len(lengths), -(-max(lengths) // 8) * 8
    query = normal(0, batch, num_heads, width + rope_dim)
    key = normal(1, batch, num_keys, num_kv_heads, width)
    value = normal(2, *key.shape[:3], value_dim) if value_dim else None
    rope_key = normal(3, batch, num_keys, rope_dim) if rope_dim else None
    rest = jnp.array(lengths)
    actual = dense_kernel.decode_attention(
        query, key, value, rest, rope_key, 0.1, splits=splits, interpret=INTERPRET
    )
    query, key, value, rope_key = exact(query, key, value, rope_key)
    check(actual, dense_reference.decode_attention(query, key, value, rest, rope_key, 0.1))


def test_interpreted_attention_to_lists_matches_the_definition():
    query, key, rope_key = normal(0, 2, 4, 160), normal(1, 2, 136, 2, 128), normal(2, 2, 136, 32)
    nothing = [-1] * 6
    lists = [[[0, 1, 1, 3, 6, 8], [2, 2, -1, -1, -1, -1]], [[0, *nothing[1:]], nothing]]
    rest = jnp.array(lists), jnp.array([135, 5]), 16
    actual = selected_kernel.decode_selected_attention(
        query, key, None, *rest, rope_key, 0.1, splits=2, interpret=INTERPRET
    )
    query, key, rope_key = exact(query, key, rope_key)
    call = query, key, None, *rest, rope_key, 0.1
    check(actual, selected_reference.decode_selected_attention(*call))


@pytest.mark.slow
def test_interpreted_lists_match_the_definition():
    query, key, rope_key = normal(0, 3, 8, 160), normal(1, 3, 104, 2, 128), normal(2, 3, 104, 32)
    lengths, kept = jnp.array([1601, 1602, 65]), jnp.full((3, 2, 8), 7)
    sizes = select_reference.Sizes(16, 16, 16, 4)
    query32, key32, rope32 = exact(query, key, rope_key)
    _, lse = dense_reference.decode_attention(query32, key32, None, lengths // 16, rope32, 0.1)
    wanted = select_reference.decode_select_blocks(
        query32, key32, rope32, lse, kept, lengths, sizes, 0.1
    )
    actual = select_kernel.decode_select_blocks(
        query, key, rope_key, lse, kept, lengths, sizes, 0.1, interpret=INTERPRET
    )
    chex.assert_trees_all_equal(actual, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
@pytest.mark.parametrize(("batch", "context"), [(1, 65536), (5, 5003)])
def test_kernels_match_the_definition(case, batch, context):
    arrays = case.arguments(batch, context)
    if case.op != "lists":
        arrays["lengths"] = arrays["lengths"] - jnp.arange(batch) * arrays["lengths"] // 7
    actual = jax.jit(kernel(case))(arrays)
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda x: case.run(x, "xla"))(
            jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays)
        )
    if case.op != "lists":
        return check(actual, wanted)
    # Sums in another order exchange blocks of almost the same importance.
    assert (actual[..., None] == wanted[..., None, :]).any(-1).mean() > 0.98


@pytest.mark.gpu
def test_api_runs_the_kernel_by_name():
    arrays = LATENT.arguments(2, 1024)
    call = {"value": None, **arrays}
    chex.assert_trees_all_equal(
        decode_attention(**call, implementation="mosaic_gpu"), decode_attention(**call)
    )
