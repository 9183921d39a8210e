"""Queries that are a part of the row give what they give among all queries of it."""

import chex
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.cases import Case, make_inputs, make_segment_ids
from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.selected_attention import reference as selected_reference
from pallas_kernels.selected_attention import selected_attention
from pallas_kernels.sliding_window_attention import reference as window_reference

pytestmark = pytest.mark.usefixtures("fast_compilation")

ASA = Case("asa", 96, document_lengths=(21, 40), num_selected_blocks=3)
NSA = Case(
    "nsa",
    num_tokens=192,
    document_lengths=(100, 33),
    compression_block_size=32,
    block_size=64,
    num_selected_blocks=3,
    queries_per_selection=1,
)


def sparse_branches(case, query, inputs, segment_ids, query_offset=None, implementation=None):
    """Compressed and selected attention of some queries, with the lists between them."""
    row = {
        "segment_ids": segment_ids,
        "query_offset": query_offset,
        "implementation": implementation,
    }
    value_dim = case.value_dim
    compressed, lse = compressed_attention(
        query,
        inputs.compressed_key,
        inputs.compressed_value,
        block_size=case.compression_block_size,
        stride=case.compression_stride,
        value_dim=value_dim,
        **row,
    )
    sizes = {"block_size": case.block_size, "queries_per_selection": case.queries_per_selection}
    lists = select_blocks(
        query,
        inputs.compressed_key,
        lse,
        num_selected_blocks=case.num_selected_blocks,
        compression_block_size=case.compression_block_size,
        compression_stride=case.compression_stride,
        **sizes,
        **row,
    )
    selected, _ = selected_attention(
        query, inputs.key, inputs.value, lists, value_dim=value_dim, **sizes, **row
    )
    return compressed, selected, lists


def in_parts(case, query, inputs, segment_ids, size=None, implementation=None):
    """The same, a block of queries at a time or `size` of them."""
    size = size or case.block_size

    def part(index: jax.Array):
        queries = jax.lax.dynamic_slice_in_dim(query, index * size, size, axis=1)
        return sparse_branches(case, queries, inputs, segment_ids, index * size, implementation)

    parts = jax.lax.map(part, jnp.arange(case.num_tokens // size))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(1, -1, *x.shape[3:]), parts)


def sums(case, function, segment_ids):
    """A function of queries and keys to outputs, lists, and gradients of a sum of outputs."""

    def of(query, inputs):
        *outputs, lists = function(case, query, inputs, segment_ids)
        compressed, selected = (x.astype(jnp.float32) for x in outputs)
        return jnp.sum(jnp.sin(compressed) + selected**2), (outputs, lists)

    return jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("gathered_score_cost", [0, 10**6], ids=["gathered", "masked"])
@pytest.mark.parametrize("case", [ASA, NSA], ids=str)
def test_parts_of_the_queries_equal_all_of_them(case, gathered_score_cost, monkeypatch):
    monkeypatch.setattr(selected_reference, "COST_OF_GATHERED_SCORE", gathered_score_cost)
    inputs, segment_ids = make_inputs(case, 0, jnp.float32), make_segment_ids(case)
    parts, whole = (
        sums(case, function, segment_ids)(inputs.query, inputs)
        for function in (in_parts, sparse_branches)
    )
    chex.assert_trees_all_close(parts, whole, atol=1e-5)


@pytest.mark.parametrize(("documents", "window_size"), [((21, 40), 16), ((), 96)])
def test_windows_of_parts_equal_those_of_the_row(documents, window_size):
    case = Case("windows", 96, document_lengths=documents)
    inputs, segment_ids = make_inputs(case, 0, jnp.float32), make_segment_ids(case)

    def attend(query, key, value, offset=None):
        return window_reference.sliding_window_attention(
            query, key, value, window_size, segment_ids, 0.3, offset
        )

    def in_parts(query, *keys):
        parts = [attend(query[:, i : i + 48], *keys, jnp.int32(i)) for i in (0, 48)]
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)

    def with_gradients(function):
        def of(*arrays):
            output, lse = function(*arrays)
            total = jnp.sum(jnp.sin(output)) + jnp.where(lse > -jnp.inf, lse, 0).sum()
            return total, (output, lse)

        return jax.jit(jax.value_and_grad(of, (0, 1, 2), has_aux=True))

    arrays = inputs.query, inputs.key, inputs.value
    parts, whole = (with_gradients(function)(*arrays) for function in (in_parts, attend))
    chex.assert_trees_all_close(parts, whole, atol=1e-5)


def test_the_row_is_asked_for():
    query, key = jnp.zeros((1, 16, 2, 4)), jnp.zeros((1, 2, 2, 4))
    call = {"query": query, "key": key, "value": key, "block_size": 16, "stride": 16}
    row = {"segment_ids": jnp.ones((1, 32), jnp.int32), "query_offset": 16}
    with pytest.raises(ValueError, match="segment_ids: query_offset needs"):
        compressed_attention(**call, query_offset=16)
    with pytest.raises(ValueError, match="query_offset: expected integers"):
        compressed_attention(**call, **row | {"query_offset": 16.0})


@pytest.mark.parametrize("operation", ["select_blocks", "selected_attention"])
def test_parts_start_with_a_block(operation):
    query, key = jnp.zeros((1, 8, 2, 4)), jnp.zeros((1, 32, 2, 4))
    row = {"segment_ids": jnp.ones((1, 32), jnp.int32), "query_offset": 8}
    sizes = {"block_size": 16, "queries_per_selection": 4}
    with pytest.raises(ValueError, match="query_offset: 8 is no multiple of block_size 16"):
        if operation == "select_blocks":
            compression = {"compression_block_size": 16, "compression_stride": 16}
            lse, call = jnp.zeros((1, 8, 2)), {"num_selected_blocks": 3, **compression}
            select_blocks(query, key[:, :2], lse, **call, **sizes, **row)
        else:
            lists = jnp.zeros((1, 2, 2, 3), jnp.int32)
            selected_attention(query, key, key, lists, **sizes, **row)
