"""Which kernels a step of decoding runs on a Hopper GPU: all that there are, for every layer."""

import logging

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from asa_jax.config import config_from_dict
from asa_jax.model.transformer import abstract_model
from configs import asa_1b, asa_340m
from pallas_kernels import dispatch


@pytest.mark.parametrize(
    ("config", "arm", "num_kernels"),
    [
        (asa_340m, "asa", 1 + 4),  # ring; block means, two for lists, listed blocks
        (asa_1b, "mla", 1),
        pytest.param(asa_1b, "nsa_paper", 5, marks=pytest.mark.slow),
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
