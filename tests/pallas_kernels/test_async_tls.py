"""AsyncTLS's choices of blocks and tokens and its attention: definitions, and what must hold."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.async_tls_attention import async_tls_attention
from pallas_kernels.async_tls_cases import ASYNC_TLS_CASES, METHODS
from pallas_kernels.async_tls_select_blocks import async_tls_select_blocks
from pallas_kernels.async_tls_select_blocks.reference import block_scores
from pallas_kernels.async_tls_select_tokens import async_tls_select_tokens
from pallas_kernels.async_tls_select_tokens.reference import Labels, label_scores
from pallas_kernels.decode_attention import decode_attention

pytestmark = pytest.mark.usefixtures("fast_compilation")
BLOCK, LENGTHS = 4, (40, 23, 5, 1)
BATCH, HEADS, KV_HEADS, DIM, TOKENS, CHANNELS = len(LENGTHS), 4, 2, 8, 40, 4


@pytest.fixture(scope="module")
def row():
    """A query, keys, values, their index and lengths."""
    random = np.random.default_rng(0)
    query = random.standard_normal((BATCH, HEADS, DIM), np.float32)
    key, value = random.standard_normal((2, BATCH, TOKENS, KV_HEADS, DIM), np.float32)
    both = np.concatenate([key, -key], -1).swapaxes(1, 2)
    bounds = both.reshape(BATCH, KV_HEADS, TOKENS // BLOCK, BLOCK, 2 * DIM).max(3)
    tokens = (BATCH, KV_HEADS, TOKENS)
    labels = Labels(
        random.integers(0, 256, (*tokens, CHANNELS // 2), np.uint8),
        random.uniform(0.1, 0.2, tokens).astype(np.float16),
        random.uniform(-2, -1, tokens).astype(np.float16),
    )
    return jax.tree.map(jnp.asarray, (query, key, value, bounds, labels, np.array(LENGTHS)))


def kept_blocks(length: int) -> set[int]:
    tail = (length - 1) // BLOCK
    return {0, max(tail - 1, 0), tail}


def listed(entries) -> list[int]:
    """The entries of a list, which end with -1."""
    entries = np.asarray(entries).tolist()
    count = sum(entry >= 0 for entry in entries)
    assert min(entries[:count], default=0) >= 0 and len(set(entries[:count])) == count
    return entries[:count]


def test_bounds_are_never_below_a_score(row):
    query, key, _, bounds, _, _ = row
    grouped = query.reshape(BATCH, KV_HEADS, -1, DIM)
    scores = jnp.einsum("bkgh,bskh->bkgs", grouped, key)
    highest = scores.reshape(*scores.shape[:3], -1, BLOCK).max(-1)
    assert (block_scores(query, bounds) >= highest - 1e-5).all()


def test_blocks_are_the_best_and_those_that_are_kept(row):
    query, _, _, bounds, _, lengths = row
    chosen = async_tls_select_blocks(query, bounds, lengths, num_blocks=3, block_size=BLOCK)
    assert chosen.shape == (BATCH, KV_HEADS, 6) and chosen.dtype == jnp.int32
    scores = np.asarray(block_scores(query, bounds).max(2))
    for b, length in enumerate(LENGTHS):
        kept = kept_blocks(length)
        others = [c for c in range(-(-length // BLOCK)) if c not in kept]
        for k in range(KV_HEADS):
            best = sorted(others, key=lambda c: -scores[b, k, c])[:3]
            assert listed(chosen[b, k]) == sorted([*kept, *best])


def test_tokens_are_those_of_the_greatest_weights(row):
    query, _, _, _, labels, lengths = row
    blocks = jnp.broadcast_to(jnp.array([7, 0, 3, 1, -1, 4]), (BATCH, KV_HEADS, 6))
    parts = query[..., ::2]
    chosen = async_tls_select_tokens(
        parts, labels, blocks, lengths, token_budget=3, block_size=BLOCK, scale=0.5
    )
    assert chosen.shape == (BATCH, KV_HEADS, 3 + 3 * BLOCK)
    scores = 0.5 * label_scores(parts.reshape(BATCH, KV_HEADS, -1, CHANNELS), labels)
    exponentials = np.exp(np.asarray(scores))
    for b, length in enumerate(LENGTHS):
        kept = kept_blocks(length)
        there = [c for c in (7, 0, 3, 1, 4) if c * BLOCK < length]
        tokens = [t for c in there for t in range(c * BLOCK, min((c + 1) * BLOCK, length))]
        competing = [t for t in tokens if t // BLOCK not in kept]
        for k in range(KV_HEADS):
            weights = exponentials[b, k][:, np.array(competing, int)]
            weights = (weights / weights.sum(-1, keepdims=True)).sum(0)
            best = [competing[i] for i in np.argsort(-weights)[:3]]
            wanted = [t for t in tokens if t // BLOCK in kept or t in best]
            assert listed(chosen[b, k]) == wanted


def test_budgets_that_cover_everything_are_dense_attention(row):
    @jax.jit
    def both(query, key, value, bounds, labels, lengths):
        blocks = async_tls_select_blocks(query, bounds, lengths, num_blocks=10, block_size=BLOCK)
        tokens = async_tls_select_tokens(
            query[..., ::2], labels, blocks, lengths, token_budget=40, block_size=BLOCK, scale=0.5
        )
        sparse = async_tls_attention(query, key, value, tokens, scale=0.5)
        return sparse, decode_attention(query, key, value, lengths, scale=0.5)

    chex.assert_trees_all_close(*both(*row), atol=1e-6)


def test_attention_does_not_depend_on_the_order_or_on_other_tokens(row):
    query, key, value, *_ = row
    positions = jnp.broadcast_to(jnp.array([5, -1, 30, 2, -1]), (BATCH, KV_HEADS, 5))
    wanted = async_tls_attention(query, key, value, positions)
    others = jnp.isin(jnp.arange(TOKENS), jnp.array([2, 5, 30]))[:, None, None]
    key, value = (jnp.where(others, x, jnp.nan) for x in (key, value))
    chex.assert_trees_all_close(
        async_tls_attention(query, key, value, positions[..., ::-1]), wanted, atol=1e-6
    )
    output, lse = async_tls_attention(query, key, value, positions * 0 - 1)
    assert not output.any() and (lse == -jnp.inf).all()


def test_arguments_that_do_not_fit_are_named(row):
    query, key, value, bounds, labels, lengths = row
    lists = jnp.zeros((BATCH, KV_HEADS, 5), int)
    blocks = {"num_blocks": 2, "block_size": BLOCK}
    tokens = {"token_budget": 2, "block_size": BLOCK, "scale": 1.0}
    for call, message in (
        (lambda: async_tls_select_blocks(query[..., 1:], bounds, lengths, **blocks), "bounds"),
        (lambda: async_tls_select_blocks(query[:, 1:], bounds, lengths, **blocks), "3 of query"),
        (lambda: async_tls_select_blocks(query, bounds, lengths * 1.0, **blocks), "lengths"),
        (lambda: async_tls_select_tokens(query, labels, lists, lengths, **tokens), "8 channels"),
        (
            lambda: async_tls_select_tokens(query[..., ::2], labels, lists[1:], lengths, **tokens),
            "block_indices",
        ),
        (lambda: async_tls_attention(query, key, value, lists[:, 1:]), "positions"),
        (lambda: async_tls_attention(query[..., 1:], key, value, lists), "key"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("case", ASYNC_TLS_CASES, ids=str)
def test_methods_take_the_arguments_of_their_cases(case):
    for method in METHODS:
        arguments = jax.eval_shape(lambda: case.arguments(method, 2, 1024))  # noqa: B023
        jax.eval_shape(lambda x: case.run(method, x, "xla"), arguments)  # noqa: B023
