"""The choices of many steps at once against those of one step after the other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asa_jax.async_tls import decoders
from asa_jax.async_tls.selection import lagged_step, synchronous_step
from asa_jax.async_tls.selection_masks import Budgets, Steps, keep_best, kept_tokens
from tests.async_tls.cases import BLOCK, LENGTH, SCALE, SMALL, Sample, jit

FIRST, STEPS = 29, 8
masks = jit(
    functools.partial(kept_tokens, scale=SCALE, block_size=BLOCK), static_argnames="decoder"
)
BY_STEP = {
    "full": decoders.full,
    "quest": decoders.quest,
    "double_sparsity": decoders.double_sparsity,
    "oracle_topk": decoders.oracle_topk,
    "synchronous": decoders.two_level,
}
static = {"static_argnames": ("scale", "cfg")}
jitted = {name: jit(function, **static) for name, function in BY_STEP.items()}
first_step, next_step = jit(synchronous_step, **static), jit(lagged_step, **static)


def steps_of(sample):
    """Eight steps of row 0, whose queries turn slowly so that the lag matters and is not all."""
    query, key = sample.queries[:, 0], sample.key[0]
    positions = FIRST + jnp.arange(STEPS)
    grouped = query.reshape(STEPS, key.shape[1], -1, query.shape[-1])
    scores = SCALE * jnp.einsum("TKGH,SKH->TKGS", grouped, key)
    seen = (jnp.arange(LENGTH) <= positions[:, None])[:, None, None]
    return Steps(query, key, positions, jax.nn.softmax(scores, where=seen))


def one_after_the_other(sample, decoder, cfg):
    """Sets of positions of row 0, [step][head]."""
    lag, chosen = None, []
    for step in range(STEPS):
        lengths = np.full(2, FIRST + step + 1)
        query, index = sample.queries[step], sample.index(lengths)
        if decoder != "lagged":
            select = jitted[decoder]
            tokens = select(query, sample.key, index, sample.channels, scale=SCALE, cfg=cfg)
        elif lag is None:
            tokens, lag = first_step(query, index, sample.channels, scale=SCALE, cfg=cfg)
        else:
            tokens, lag, _ = next_step(query, index, sample.channels, lag, scale=SCALE, cfg=cfg)
        chosen.append([set(head[head >= 0].tolist()) for head in np.asarray(tokens)[0]])
    return chosen


# A program for each; those that share all steps with these take as long and show as much.
SLOW = ("full", "double_sparsity", "oracle_topk", "synchronous")


@pytest.mark.parametrize(
    "decoder", ["quest", "lagged", *(pytest.param(d, marks=pytest.mark.slow) for d in SLOW)]
)
def test_masks_are_the_lists_of_each_step(decoder):
    sample = Sample(3)
    for blocks, budget in ((2, 5), (3, 8)):
        cfg = dataclasses.replace(SMALL, num_blocks=blocks, token_budget=budget)
        budgets = Budgets(jnp.int32(budget), jnp.int32(blocks))
        kept, recall = masks(steps_of(sample), sample.channels, budgets, decoder=decoder)
        found = [[set(np.flatnonzero(head)) for head in step] for step in np.asarray(kept)]
        assert found == one_after_the_other(sample, decoder, cfg)
        assert (float(recall) == 1) == (decoder in ("full", "oracle_topk"))


def test_the_best_are_those_of_a_sort_and_of_equal_ones_the_first():
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 4, (5, 40)).astype(np.float32) * rng.choice([1.0, 1e30], (5, 40))
    there = rng.random((5, 40)) < 0.6
    for count in (0, 1, 7, 40):
        kept = np.asarray(keep_best(jnp.asarray(scores), jnp.asarray(there), jnp.int32(count)))
        for row, mask, wanted in zip(scores, there, kept, strict=True):
            places = np.flatnonzero(mask)
            best = places[np.argsort(-row[places], kind="stable")][:count]
            assert set(np.flatnonzero(wanted)) == set(best.tolist())
