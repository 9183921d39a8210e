"""The XLA definitions against the dense float64 oracle: values, log-sum-exp and every gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chunking
from pallas_kernels.cases import SMALL_CASES, Case, Inputs, make_inputs, make_segment_ids
from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.selected_attention import reference as selected_reference
from pallas_kernels.selected_attention import selected_attention
from pallas_kernels.sliding_window_attention import sliding_window_attention
from tests.pallas_kernels import oracle

pytestmark = pytest.mark.usefixtures("fast_compilation")

WHOLE = [case for case in SMALL_CASES if case.name in ("odd_length", "shared_latent", "packed")]


@pytest.fixture(
    params=[(case, 512) for case in SMALL_CASES] + [(case, 2**20) for case in WHOLE],
    ids=[f"{case}-chunked" for case in SMALL_CASES] + [f"{case}-whole" for case in WHOLE],
)
def case(request, monkeypatch):
    """Every case with its scores in many chunks, some also with all scores in one."""
    case, scores_per_chunk = request.param
    monkeypatch.setattr(chunking, "SCORES_PER_CHUNK", scores_per_chunk)
    return case


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_inputs(case: Case) -> Inputs:
    return make_inputs(case, 3, jnp.float64)


def random_lists(case: Case, seed: int = 0) -> np.ndarray:
    """Lists [B, M, K, L] in any order with repetitions, -1, blocks of the future and beyond."""
    num_groups = -(-case.num_tokens // case.queries_per_selection)
    num_blocks = -(-case.num_tokens // case.block_size)
    shape = (case.batch, num_groups, case.num_kv_heads, case.num_selected_blocks)
    lists = np.random.default_rng(seed).integers(-1, num_blocks + 1, shape, np.int32)
    lists[:, -1] = -1  # a group that sees nothing
    return lists


def check(case, operation, query, key, value, mask):
    """Compares an operation, and its gradients in a random direction, with the oracle."""
    random = np.random.default_rng(7)
    cotangents = (
        random.standard_normal((*query.shape[:3], case.value_dim)),
        random.standard_normal(query.shape[:3]),
    )
    options = {"segment_ids": make_segment_ids(case)}
    if value is None:
        arrays, options["value_dim"] = (query, key), case.value_dim
    else:
        arrays = (query, key, value)

    @jax.jit
    def run(arrays, cotangents):
        results, pullback = jax.vjp(lambda q, k, v=None: operation(q, k, v, **options), *arrays)
        return results, pullback(cotangents)

    results, gradients = run(arrays, cotangents)
    query, key = np.asarray(query), np.asarray(key)
    prefix = key[..., : case.value_dim]
    output, lse, pullback = oracle.attention(
        query, key, prefix if value is None else np.asarray(value), mask
    )
    dquery, dkey, dvalue = pullback(*cotangents)
    if value is None:
        dkey[..., : case.value_dim] += dvalue
    expected = (dquery, dkey) if value is None else (dquery, dkey, dvalue)
    chex.assert_trees_all_close(results, (output, lse), rtol=1e-11, atol=1e-11)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-11, atol=1e-11)


def test_sliding_window_attention(case):
    inputs = random_inputs(case)

    def operation(*arrays, **options):
        return sliding_window_attention(*arrays, window_size=case.window_size, **options)

    mask = oracle.window_mask(case)
    check(case, operation, inputs.query, inputs.key, inputs.value, mask)


def test_compressed_attention(case):
    inputs = random_inputs(case)

    def operation(*arrays, **options):
        sizes = {"block_size": case.compression_block_size, "stride": case.compression_stride}
        return compressed_attention(*arrays, **sizes, **options)

    mask = oracle.compressed_mask(case)
    check(case, operation, inputs.query, inputs.compressed_key, inputs.compressed_value, mask)


@pytest.mark.parametrize("gathered_score_cost", [0, 10**6], ids=["gathered", "masked"])
def test_selected_attention(case, gathered_score_cost, monkeypatch):
    monkeypatch.setattr(selected_reference, "COST_OF_GATHERED_SCORE", gathered_score_cost)
    inputs, lists = random_inputs(case), random_lists(case)

    def operation(query, key, value, **options):
        sizes = {
            "block_size": case.block_size,
            "queries_per_selection": case.queries_per_selection,
        }
        return selected_attention(query, key, value, jnp.asarray(lists), **sizes, **options)

    mask = oracle.selected_mask(case, lists)
    check(case, operation, inputs.query, inputs.key, inputs.value, mask)


def select(case: Case, inputs: Inputs, segment_ids: jax.Array | None) -> jax.Array:
    """Compressed attention and then the choice of blocks, as a layer does."""
    value_dim = case.value_dim if inputs.compressed_value is None else None
    _, lse = compressed_attention(
        inputs.query,
        inputs.compressed_key,
        inputs.compressed_value,
        value_dim=value_dim,
        block_size=case.compression_block_size,
        stride=case.compression_stride,
        segment_ids=segment_ids,
    )
    return select_blocks(
        inputs.query,
        inputs.compressed_key,
        lse,
        num_selected_blocks=case.num_selected_blocks,
        block_size=case.block_size,
        compression_block_size=case.compression_block_size,
        compression_stride=case.compression_stride,
        queries_per_selection=case.queries_per_selection,
        segment_ids=segment_ids,
    )


def test_select_blocks(case):
    inputs = random_inputs(case)
    lists = jax.jit(lambda inputs: select(case, inputs, make_segment_ids(case)))(inputs)
    chex.assert_type(lists, jnp.int32)
    expected = oracle.selection(case, np.asarray(inputs.query), np.asarray(inputs.compressed_key))
    chex.assert_trees_all_equal(np.asarray(lists), expected)
