import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from asa_jax.interop.huggingface import load_model
from asa_jax.model.transformer import abstract_model
from tests.interop.reference_cases import CASES, PROMPT, REFERENCE, write_model
from tests.models import QUICK_COMPILE


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(tmp_path, name):
    cfg, params, _ = load_model(write_model(tmp_path, CASES[name]))
    tokens, logits = _reference(name)
    found = _logits(cfg, params, tokens)
    np.testing.assert_allclose(found, logits, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(found[len(PROMPT) - 1 : -1].argmax(-1), tokens[len(PROMPT) :])


def _reference(name):
    with np.load(REFERENCE) as arrays:
        return arrays[f"{name}/tokens"], arrays[f"{name}/logits"]


def _logits(cfg, params, tokens):
    def forward(params, tokens):
        model = nnx.merge(abstract_model(cfg)[0], params)
        positions = jnp.arange(tokens.shape[1])[None]
        return model(tokens, positions, jnp.ones_like(tokens)) @ model.unembedding()

    with jax.default_matmul_precision("highest"):
        forward = jax.jit(forward, compiler_options=QUICK_COMPILE)
        return np.asarray(forward(params, tokens[None]))[0]
