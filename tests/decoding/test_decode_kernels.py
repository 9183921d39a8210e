"""What a step of decoding runs: every kernel that there is, on caches where they lie."""

import dataclasses
import logging

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from asa_jax.config import config_from_dict
from asa_jax.decoding.runner import Runner
from asa_jax.model.transformer import abstract_model
from configs import asa_1b, asa_340m
from pallas_kernels import dispatch
from tests.models import random_params, tiny_model_config


@pytest.mark.parametrize(
    ("config", "arm", "num_kernels"),
    [
        (asa_340m, "asa", 1 + 4),  # ring; block means, two for lists, listed blocks
        (asa_1b, "mla", 1),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_step_lowers_to_kernels(config, arm, num_kernels, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "is_hopper", lambda: True)
    cfg = config_from_dict(config.get_config(arm).to_dict()).model
    graphdef, params, _ = abstract_model(cfg)

    def step(params, tokens, positions, cache):
        return nnx.merge(graphdef, params).decode(tokens, positions, cache)

    cache = jax.eval_shape(lambda p: nnx.merge(graphdef, p).init_cache(2, 4096), params)
    row = jax.ShapeDtypeStruct((2,), jnp.int32)
    with caplog.at_level(logging.WARNING):
        traced = jax.jit(step).trace(params, row, row, cache)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == num_kernels  # of one period of the layers
    assert not caplog.records  # nothing fell back to XLA


def test_a_stack_of_layers_is_decoded_as_a_list():
    """A scan would copy the caches of all layers at every step."""
    listed_cfg = tiny_model_config(("full", "sliding") * 2)
    listed = random_params(listed_cfg)
    groups = [listed["groups"][i] for i in range(2)]
    stacked = {**listed, "groups": jax.tree.map(lambda *x: jnp.stack(x), *groups)}
    cfg = dataclasses.replace(listed_cfg, scan_layers=True)
    runner = Runner(cfg, stacked, vocab_size=64)
    assert runner.cfg == listed_cfg
    chex.assert_trees_all_equal(runner.params, listed)
    shapes = jax.tree.leaves(runner.shapes(64).cache)
    assert {leaf.shape[0] for leaf in shapes} == {1}  # the row leads, not the layer
