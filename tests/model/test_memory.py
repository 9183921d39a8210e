"""Memory of a training step at the tiny width: linear in the length of the context."""

import jax
import pytest
from flax import nnx

from asa_jax.config import config_from_dict
from asa_jax.model.transformer import abstract_model
from asa_jax.training.losses import summed_nll
from configs import tiny


def _temporary_bytes(length: int) -> int:
    """What the compiled loss and gradients of one row need beside parameters and results."""
    config = config_from_dict(tiny.get_config().to_dict())
    graphdef, params, _ = abstract_model(config.model)
    row = jax.ShapeDtypeStruct((1, length), "int32")

    def loss(params, inputs, positions, segment_ids):
        model = nnx.merge(graphdef, params)
        hidden = model(inputs, positions, segment_ids)
        chunk = config.training.loss_chunk_tokens
        return summed_nll(hidden, model.unembedding(), inputs, segment_ids > 0, chunk)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, row, row, row).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_a_step_of_8192_tokens():
    """A [T, T] tensor would make it grow fourfold from 4096 to 8192 tokens."""
    short, long = (_temporary_bytes(length) for length in (4096, 8192))
    assert long < 2.3 * short
    assert long < 4 * 2**30
