"""Queries that are a part of the row give what they give among all queries of it."""

import chex
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.cases import Case, make_inputs, make_segment_ids
from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.selected_attention import reference as selected_reference
from pallas_kernels.selected_attention import selected_attention

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


def sparse_branches(case, query, inputs, segment_ids, query_offset=None):
    """Compressed and selected attention of some queries, with the lists between them."""
    row = {"segment_ids": segment_ids, "query_offset": query_offset}
    compressed, lse = compressed_attention(
        query,
        inputs.compressed_key,
        inputs.compressed_value,
        block_size=case.compression_block_size,
        stride=case.compression_stride,
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
    selected, _ = selected_attention(query, inputs.key, inputs.value, lists, **sizes, **row)
    return compressed, selected, lists


def in_parts(case, query, inputs, segment_ids):
    """The same, a block of queries at a time."""

    def part(index: jax.Array):
        offset = index * case.block_size
        queries = jax.lax.dynamic_slice_in_dim(query, offset, case.block_size, axis=1)
        return sparse_branches(case, queries, inputs, segment_ids, offset)

    parts = jax.lax.map(part, jnp.arange(case.num_tokens // case.block_size))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(1, -1, *x.shape[3:]), parts)


@pytest.mark.parametrize("gathered_score_cost", [0, 10**6], ids=["gathered", "masked"])
@pytest.mark.parametrize("case", [ASA, NSA], ids=str)
def test_parts_of_the_queries_equal_all_of_them(case, gathered_score_cost, monkeypatch):
    monkeypatch.setattr(selected_reference, "COST_OF_GATHERED_SCORE", gathered_score_cost)
    inputs, segment_ids = make_inputs(case, 0, jnp.float32), make_segment_ids(case)

    def sums(function):
        def of(query, inputs):
            compressed, selected, lists = function(case, query, inputs, segment_ids)
            return jnp.sum(jnp.sin(compressed) + selected**2), (compressed, selected, lists)

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=True))(inputs.query, inputs)

    chex.assert_trees_all_close(sums(in_parts), sums(sparse_branches), atol=1e-5)


def test_the_kernels_decline_and_the_row_is_asked_for(monkeypatch):
    monkeypatch.setattr(dispatch, "is_hopper", lambda: True)
    query, key = jnp.zeros((1, 16, 2, 4)), jnp.zeros((1, 2, 2, 4))
    call = {"query": query, "key": key, "value": key, "block_size": 16, "stride": 16}
    row = {"segment_ids": jnp.ones((1, 32), jnp.int32), "query_offset": 16}
    with pytest.raises(NotImplementedError, match="query_offset is given"):
        compressed_attention(**call, **row, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="segment_ids: query_offset needs"):
        compressed_attention(**call, query_offset=16)
    with pytest.raises(ValueError, match="query_offset: expected integers"):
        compressed_attention(**call, **row | {"query_offset": 16.0})
