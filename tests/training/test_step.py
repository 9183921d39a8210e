"""The training step on a toy model: accumulation, counting, steps that are not finite."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from asa_jax.data.pipeline import NOT_LEARNT
from asa_jax.model.transformer import Transformer
from asa_jax.training.optimizer import make_optimizer, make_schedule
from asa_jax.training.step import SPIKE_FIRST_STEPS, TrainState, make_step, make_sums

AXES = {"w": ("embed", "mlp"), "b": ("activation",)}
FEATURES, ROWS, LENGTH = 4, 8, 6


def _sums(params, batch):
    """A regression in the place of the model: 'nll' is a squared error a token."""
    x = batch["inputs"][..., None] * jnp.arange(1.0, FEATURES + 1)
    error = jnp.sum(jnp.tanh(x @ params["w"]) + params["b"], axis=-1) - batch["targets"]
    read = batch["segment_ids"] > 0
    counted = read & (batch["targets"] >= 0)
    return {
        "nll": jnp.sum(error**2, where=counted),
        "tokens": jnp.sum(read),
        "targets": jnp.sum(counted),
        "target_bytes": 2 * jnp.sum(counted),
    }


def _sqrt_sums(params, batch):
    """Finite at b = 0, with an infinite gradient there."""
    sums = _sums(params, batch)
    return sums | {"nll": sums["nll"] + jnp.sum(jnp.sqrt(params["b"]))}


def _batch(seed=0):
    rng = np.random.default_rng(seed)
    # Rows of different numbers of tokens, some of which count.
    segment_ids = np.arange(LENGTH)[None] < rng.integers(0, LENGTH + 1, (ROWS, 1))
    return {
        "inputs": rng.normal(size=(ROWS, LENGTH)).astype("float32"),
        "targets": rng.normal(1.0, size=(ROWS, LENGTH)).astype("float32"),
        "segment_ids": segment_ids.astype("int32"),
    }


def _start(config):
    rng = np.random.default_rng(1)
    params = {
        "w": jnp.asarray(rng.normal(size=(FEATURES, 3)), jnp.float32),
        "b": jnp.zeros(3),
    }
    zero = jnp.int32(0)
    return TrainState(
        params,
        make_optimizer(config.optimizer, AXES).init(params),
        zero,
        zero,
        zero,
        jnp.float32(0),
    )


def _make(make_config, sums=_sums, spike_factor=0.0, **overrides):
    fields = {f"optimizer.{k}": v for k, v in overrides.items()}
    config = make_config(**{"training.spike_factor": spike_factor}, **fields)
    step = jax.jit(make_step(sums, AXES, config, config.optimizer.accumulation_steps or 1))
    schedule = make_schedule(config.optimizer, config.training.steps)
    return lambda state, batch: step(state, batch, schedule), _start(config), config


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_accumulation_equals_the_large_batch(make_config, name):
    results = []
    for parts in (1, 2, 8):
        step, state, _ = _make(make_config, name=name, accumulation_steps=parts)
        for seed in range(3):
            state, metrics = step(state, _batch(seed))
        results.append((state, metrics))
    for result in results[1:]:
        chex.assert_trees_all_close(result, results[0], rtol=1e-5, atol=1e-7)


def test_metrics(make_config):
    step, state, config = _make(make_config, warmup_steps=2)
    batch = _batch()
    expected = jax.tree.map(float, _sums(state.params, batch))

    def mean(params):
        return _sums(params, batch)["nll"] / expected["targets"]

    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(mean)(state.params))))
    after, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], expected["nll"] / expected["targets"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], config.optimizer.learning_rate / 2)
    assert metrics["tokens"] == expected["tokens"] == np.sum(batch["segment_ids"])
    assert metrics["target_bytes"] == 2 * metrics["targets"] == 2 * expected["targets"]
    assert 0 < expected["targets"] < expected["tokens"]
    assert after.step == 1


@pytest.mark.parametrize(
    ("name", "array", "bad", "parts"),
    [
        ("adamw", "inputs", np.nan, 1),
        ("adamw", "targets", np.inf, 2),
        ("muon", "inputs", np.nan, 2),
    ],
)
def test_a_loss_that_is_not_finite_changes_no_parameter_and_no_moment(
    make_config, name, array, bad, parts
):
    step, state, _ = _make(make_config, name=name, accumulation_steps=parts)
    state, _ = step(state, _batch(0))
    poisoned = _batch(1)
    row, column = np.argwhere((poisoned["segment_ids"] > 0) & (poisoned["targets"] >= 0))[0]
    poisoned[array][row, column] = bad
    for count in (1, 2, 3):
        after, metrics = step(state, poisoned)
        chex.assert_trees_all_equal(
            (after.params, after.opt_state), (state.params, state.opt_state)
        )
        assert not np.isfinite(metrics["loss"])
        assert metrics["skipped_steps"] == metrics["skipped_in_a_row"] == count
        assert after.step == state.step + 1
        state = after
    state, metrics = step(state, _batch(2))
    assert np.isfinite(metrics["loss"])
    assert (metrics["skipped_steps"], metrics["skipped_in_a_row"]) == (3, 0)
    # The updates are those of a run that never saw the bad batches.
    clean_step, clean, _ = _make(make_config, name=name, accumulation_steps=parts)
    for seed in (0, 2):
        clean, _ = clean_step(clean, _batch(seed))
    chex.assert_trees_all_equal(state.params, clean.params)


def test_an_infinite_gradient_of_a_finite_loss_is_left_out(make_config):
    """Clipping would turn it into NaN everywhere."""
    step, state, _ = _make(make_config, sums=_sqrt_sums)
    after, metrics = step(state, _batch())
    assert np.isfinite(metrics["loss"]) and np.isinf(metrics["grad_norm"])
    chex.assert_trees_all_equal((after.params, after.opt_state), (state.params, state.opt_state))
    assert metrics["skipped_in_a_row"] == 1


def test_a_gradient_out_of_proportion_is_left_out(make_config):
    step, state, _ = _make(make_config, spike_factor=5.0)
    wild = _batch(0)
    wild["targets"] *= 1000
    _, metrics = step(state, wild)
    assert metrics["skipped_steps"] == 0  # nothing is known at first
    norms = []
    for seed in range(SPIKE_FIRST_STEPS):
        state, metrics = step(state, _batch(seed))
        norms.append(metrics["grad_norm"])
    np.testing.assert_allclose(state.grad_norm_average, np.mean(norms), rtol=1e-5)
    after, metrics = step(state, wild)
    assert metrics["grad_norm"] > 5 * metrics["grad_norm_average"] > 0
    assert (metrics["skipped_steps"], metrics["skipped_in_a_row"]) == (1, 1)
    chex.assert_trees_all_equal(
        after._replace(step=state.step, skipped_steps=0, skipped_in_a_row=0),
        state._replace(skipped_steps=0, skipped_in_a_row=0),
    )
    after, metrics = step(after, _batch(1))
    assert (metrics["skipped_steps"], metrics["skipped_in_a_row"]) == (1, 0)
    assert after.grad_norm_average != state.grad_norm_average


def test_a_batch_of_padding_alone_changes_nothing_but_decay(make_config):
    step, state, _ = _make(make_config, weight_decay=0.0)
    batch = _batch() | {"segment_ids": np.zeros((ROWS, LENGTH), "int32")}
    after, metrics = step(state, batch)
    assert metrics["loss"] == metrics["grad_norm"] == 0
    chex.assert_trees_all_equal(after.params, state.params)


def test_steps_and_schedules_share_one_trace(make_config):
    config = make_config()
    step = jax.jit(chex.assert_max_traces(make_step(_sums, AXES, config, 1), n=1))
    state, rates = _start(config), []
    for seed, (rate, steps) in enumerate([(1e-3, 10), (1e-3, 10), (2e-3, 20)]):
        changed = dataclasses.replace(config.optimizer, learning_rate=rate, warmup_steps=0)
        state, metrics = step(state, _batch(seed), make_schedule(changed, steps))
        rates.append(float(metrics["learning_rate"]))
    assert rates[1] < rates[0] <= 1e-3 < rates[2] < 2e-3


def test_targets_of_prompts_are_read_and_do_not_count(make_config):
    """All sums of a batch are those of its targets one by one."""
    config = make_config(**{"data.batch_size": 2})
    shape = (2, config.data.sequence_length)
    rng = np.random.default_rng(0)
    graphdef, params = nnx.split(Transformer(config.model, rngs=nnx.Rngs(0)))
    lengths = rng.integers(1, 5, config.model.vocab_size)
    sums = jax.jit(make_sums(graphdef, lengths, config.training.loss_chunk_tokens))
    tokens = rng.integers(0, config.model.vocab_size, (2, *shape)).astype("int32")
    inputs, targets = tokens
    batch = {
        "inputs": inputs,
        "segment_ids": np.ones(shape, "int32"),
        "positions": np.arange(shape[1], dtype="int32") + np.zeros(shape, "int32"),
    }
    learnt = rng.random(shape) < 0.4
    parts = [
        sums(params, batch | {"targets": np.where(where, targets, NOT_LEARNT)})
        for where in (learnt, ~learnt)
    ]
    whole = sums(params, batch | {"targets": targets})
    for name in ("nll", "targets", "target_bytes"):
        np.testing.assert_allclose(parts[0][name] + parts[1][name], whole[name], rtol=1e-6)
    assert parts[0]["tokens"] == whole["tokens"] and parts[0]["targets"] == learnt.sum()
