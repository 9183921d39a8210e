"""Properties of the operations that need no oracle."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.test_util import check_grads

from pallas_kernels import chunking
from pallas_kernels.blocks import number_of_blocks
from pallas_kernels.cases import Case, make_inputs, make_segment_ids
from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.selected_attention import reference as selected_reference
from pallas_kernels.selected_attention import selected_attention
from pallas_kernels.sliding_window_attention import sliding_window_attention

pytestmark = pytest.mark.usefixtures("fast_compilation")

ASA = Case("asa", num_tokens=102, window_size=9, num_selected_blocks=4)
NSA = Case(
    "nsa",
    num_tokens=200,
    window_size=9,
    num_selected_blocks=3,
    compression_block_size=32,
    block_size=64,
    queries_per_selection=1,
)


def pool(array: jax.Array, case: Case) -> jax.Array:
    """Means of the compression blocks, [B, T, K, H] -> [B, C, K, H]."""
    size, stride = case.compression_block_size, case.compression_stride
    starts = stride * np.arange(number_of_blocks(array.shape[1], size, stride))
    return array[:, starts[:, None] + np.arange(size)].mean(2)


def layer(case, query, key, value, segment_ids=None):
    """All four operations in a row, as layers use them: outputs and the lists of blocks."""
    compressed_key = pool(key, case)
    window, _ = sliding_window_attention(
        query, key, value, window_size=case.window_size, segment_ids=segment_ids
    )
    compressed, lse = compressed_attention(
        query,
        compressed_key,
        pool(value, case),
        block_size=case.compression_block_size,
        stride=case.compression_stride,
        segment_ids=segment_ids,
    )
    lists = select_blocks(
        query,
        compressed_key,
        lse,
        num_selected_blocks=case.num_selected_blocks,
        block_size=case.block_size,
        compression_block_size=case.compression_block_size,
        compression_stride=case.compression_stride,
        queries_per_selection=case.queries_per_selection,
        segment_ids=segment_ids,
    )
    selected, _ = selected_attention(
        query,
        key,
        value,
        lists,
        block_size=case.block_size,
        queries_per_selection=case.queries_per_selection,
        segment_ids=segment_ids,
    )
    return (window, compressed, selected), lists


def arrays_of(case: Case, dtype=jnp.float32) -> tuple[jax.Array, ...]:
    inputs = make_inputs(case, 5, dtype)
    return inputs.query, inputs.key, inputs.value


def full_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    missing = key.shape[3] - value.shape[3]
    padded = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, missing)))
    output = jax.nn.dot_product_attention(query, key, padded, is_causal=True)
    return output[..., : value.shape[3]]


@pytest.mark.parametrize("case", [ASA, NSA], ids=str)
def test_no_token_sees_the_future(case):
    arrays = arrays_of(case)

    @jax.jit
    def perturbed(token, amount):
        return layer(case, *(array.at[:, token].add(amount) for array in arrays))[0]

    plain = perturbed(0, 0.0)
    # Every offset in a block and in a group of queries, past the first two blocks.
    for token in range(2 * case.block_size, 3 * case.block_size + 4):
        changed = perturbed(token, 1.0)
        for before, after in zip(plain, changed, strict=True):
            chex.assert_trees_all_equal(before[:, :token], after[:, :token])
        assert not np.array_equal(plain[0][:, token], changed[0][:, token])


@pytest.mark.parametrize("gathered_score_cost", [0, 10**6], ids=["gathered", "masked"])
def test_all_blocks_selected_is_full_attention(gathered_score_cost, monkeypatch):
    monkeypatch.setattr(selected_reference, "COST_OF_GATHERED_SCORE", gathered_score_cost)
    case = dataclasses.replace(ASA, num_selected_blocks=8)
    query, key, value = arrays_of(case)
    output = jax.jit(lambda *arrays: layer(case, *arrays)[0][2])(query, key, value)
    chex.assert_trees_all_close(output, full_attention(query, key, value), atol=2e-6)


@pytest.mark.parametrize("window_size", [102, 103, 1000])
def test_window_of_the_whole_row_is_full_attention(window_size):
    query, key, value = arrays_of(ASA)
    output, _ = jax.jit(lambda *arrays: sliding_window_attention(*arrays, window_size=window_size))(
        query, key, value
    )
    chex.assert_trees_all_close(output, full_attention(query, key, value), atol=2e-6)


def test_window_of_one_is_the_value():
    query, key, value = arrays_of(ASA)
    output, _ = jax.jit(lambda *arrays: sliding_window_attention(*arrays, window_size=1))(
        query, key, value
    )
    chex.assert_trees_all_close(output, jnp.repeat(value, 2, axis=2), atol=1e-6)


def test_sharing_a_list_is_to_use_that_of_the_first_query():
    arrays = arrays_of(ASA)
    each = dataclasses.replace(ASA, queries_per_selection=1)
    (_, _, shared_output), shared = jax.jit(lambda *arrays: layer(ASA, *arrays))(*arrays)
    _, own = jax.jit(lambda *arrays: layer(each, *arrays))(*arrays)
    chex.assert_trees_all_equal(shared, own[:, ::4])
    assert not np.array_equal(own, jnp.repeat(shared, 4, axis=1)[:, : ASA.num_tokens])
    output, _ = selected_attention(
        *arrays,
        jnp.repeat(shared, 4, axis=1)[:, : ASA.num_tokens],
        block_size=16,
        queries_per_selection=1,
    )
    chex.assert_trees_all_close(shared_output, output, atol=1e-6)


def test_packed_documents_are_separate_runs():
    lengths, starts = (21, 70), (0, 32)
    packed = dataclasses.replace(ASA, num_tokens=120, document_lengths=lengths)
    segment_ids, arrays = make_segment_ids(packed), arrays_of(packed)

    def run(case, segment_ids, *arrays):
        def loss(*arrays):
            outputs, lists = layer(case, *arrays, segment_ids)
            return sum((output**2).sum() for output in outputs), (outputs, lists)

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    run = jax.jit(run, static_argnums=0)
    (_, (outputs, lists)), gradients = run(packed, segment_ids, *arrays)
    for start, length in zip(starts, lengths, strict=True):
        tokens = slice(start, start + length)
        single = [array[:, tokens] for array in arrays]
        case = dataclasses.replace(ASA, num_tokens=length)
        (_, (own_outputs, own_lists)), own_gradients = run(case, None, *single)
        ours = [array[:, tokens] for array in (*outputs, *gradients)]
        chex.assert_trees_all_close(ours, [*own_outputs, *own_gradients], atol=1e-5)
        groups = slice(start // 4, start // 4 + own_lists.shape[1])
        shifted = jnp.where(own_lists >= 0, own_lists + start // 16, -1)
        chex.assert_trees_all_equal(lists[:, groups], shifted)
    padding = np.asarray(segment_ids[0] == 0)
    for array in (*outputs, *gradients):
        chex.assert_trees_all_equal(array[:, padding], jnp.zeros_like(array[:, padding]))


def test_tokens_before_the_first_complete_block_attend_to_nothing():
    query, key, _ = arrays_of(ASA)
    query, key = query[:, :20], key[:, :1]

    def loss(query, key):
        output, lse = compressed_attention(query, key, None, value_dim=8, block_size=16, stride=16)
        finite_lse = jnp.where(lse > -jnp.inf, lse, 0)
        return (output**2).sum() + finite_lse.sum() + output.sum(), (output, lse)

    (_, (output, lse)), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        query, key
    )
    chex.assert_trees_all_equal(output[:, :15], jnp.zeros((1, 15, 4, 8)))
    chex.assert_trees_all_equal(lse[:, :15], jnp.full((1, 15, 4), -jnp.inf))
    assert (lse[:, 15:] > -jnp.inf).all()
    chex.assert_tree_all_finite(gradients)
    chex.assert_trees_all_equal(gradients[0][:, :15], jnp.zeros((1, 15, 4, 12)))


def attention_operations(case: Case, lists: np.ndarray):
    """The three attention operations as functions of query, key and value."""
    sizes = {"block_size": case.block_size, "queries_per_selection": case.queries_per_selection}
    return {
        "window": lambda q, k, v: sliding_window_attention(q, k, v, window_size=case.window_size),
        "compressed": lambda q, k, v: compressed_attention(
            q,
            pool(k, case),
            pool(v, case),
            block_size=case.compression_block_size,
            stride=case.compression_stride,
        ),
        "selected": lambda q, k, v: selected_attention(q, k, v, jnp.asarray(lists), **sizes),
    }


FIXED_LISTS = np.asarray([[0, 2, -1], [3, 1, 1]], np.int32)[None, None].repeat(26, axis=1)
OPERATIONS = attention_operations(ASA, FIXED_LISTS)
each_operation = pytest.mark.parametrize("name", OPERATIONS)


@each_operation
def test_gradient_is_that_of_finite_differences(name):
    with jax.enable_x64(True):
        arrays = arrays_of(ASA, jnp.float64)

        @jax.jit
        def function(*arrays):
            output, lse = OPERATIONS[name](*arrays)
            return output, jnp.where(lse > -jnp.inf, lse, 0)

        check_grads(function, arrays, order=1, modes=["rev"], rtol=1e-6, atol=1e-6)


@each_operation
def test_bfloat16_is_as_near_as_its_rounding(name):
    def run(arrays):
        (output, lse), pullback = jax.vjp(OPERATIONS[name], *arrays)
        return output, lse, *pullback((jnp.ones_like(output), jnp.zeros_like(lse)))

    half = arrays_of(ASA, jnp.bfloat16)
    output, lse, *gradients = jax.jit(run)(half)
    chex.assert_type([output, *gradients, lse], [jnp.bfloat16] * 4 + [jnp.float32])
    expected = jax.jit(run)(tuple(array.astype(jnp.float32) for array in half))
    for actual, reference in zip((output, lse, *gradients), expected, strict=True):
        seen = jnp.isfinite(reference)
        error = jnp.where(seen, actual.astype(jnp.float32) - reference, 0)
        size = jnp.where(seen, reference, 0)
        assert jnp.linalg.norm(error) < 0.01 * jnp.linalg.norm(size)


@each_operation
def test_vmap_scan_and_checkpoint_change_nothing(name, monkeypatch):
    monkeypatch.setattr(chunking, "SCORES_PER_CHUNK", 2048)
    arrays = arrays_of(ASA)
    stacked = tuple(jnp.stack([array, 2 * array])[:, None] for array in arrays)

    def loss(*arrays):
        return (OPERATIONS[name](*arrays)[0] ** 2).sum()

    def scanned_loss(stacked):
        layer = jax.checkpoint(loss)
        return jax.lax.scan(lambda sum, arrays: (sum + layer(*arrays), None), 0.0, stacked)[0]

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    expected = [gradient(*(array[i, 0] for array in stacked)) for i in range(2)]
    expected = jax.tree.map(lambda *pair: jnp.stack(pair)[:, None], *expected)
    gradients = jax.jit(jax.vmap(jax.grad(scanned_loss)))(stacked)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-4, atol=1e-5)


def largest_array(jaxpr) -> int:
    """Elements of the largest array that a jaxpr, or one inside it, makes."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size for variable in equation.outvars]
        sizes += [largest_array(inner) for inner in jaxprs_in_params(equation.params)]
    return max(sizes)


LONG = dataclasses.replace(ASA, num_tokens=8192, window_size=128)
LONG_LISTS = np.zeros((1, 2048, 2, 3), np.int32)


@pytest.mark.parametrize("gathered_score_cost", [0, 10**6], ids=["gathered", "masked"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_array_is_quadratic_in_the_length(name, gathered_score_cost, monkeypatch):
    monkeypatch.setattr(selected_reference, "COST_OF_GATHERED_SCORE", gathered_score_cost)
    operation = attention_operations(LONG, LONG_LISTS)[name]

    def loss(*arrays):
        output, lse = operation(*arrays)
        return output.sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays_of(LONG)).jaxpr
    assert largest_array(jaxpr) <= 2 * chunking.SCORES_PER_CHUNK < LONG.num_tokens**2 / 16
