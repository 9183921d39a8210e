"""Step-by-step decoding with caches against the forward pass, for every layer kind."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.model.transformer import abstract_model
from tests.decoding.kind_cases import CASES
from tests.models import QUICK_COMPILE, random_params, tiny_model_config

# Prompts of one batch: around the window (12), blocks (16) and query groups (4), all residues of 4.
LENGTHS = np.array((1, 2, 3, 4, 11, 12, 13, 15, 16, 17, 31, 32, 33, 34, 35))
NUM_STEPS = 32
TOKENS = np.random.default_rng(1).integers(64, size=(15, 35 + NUM_STEPS), dtype=np.int32)


def _decode(cfg: ModelConfig, params: Any, cache_length: int) -> jax.Array:
    """Hidden states [B, NUM_STEPS + 1, D] after a prefill of LENGTHS tokens and after each step."""
    graphdef, _, _ = abstract_model(cfg)
    rows, tokens = jnp.arange(len(LENGTHS)), jnp.array(TOKENS)

    def run(params):
        model = nnx.merge(graphdef, params)
        # What lies behind a prompt must not matter.
        behind = np.arange(max(LENGTHS)) >= LENGTHS[:, None]
        prompts = jnp.where(behind, 63, TOKENS[:, : max(LENGTHS)])
        empty = model.init_cache(len(LENGTHS), cache_length)
        first, cache = model.prefill(prompts, jnp.array(LENGTHS), empty)

        def step(cache, position):
            hidden, cache = model.decode(tokens[rows, position], position, cache)
            return cache, hidden

        _, rest = jax.lax.scan(step, cache, LENGTHS + jnp.arange(NUM_STEPS)[:, None])
        return jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], axis=1)

    return jax.jit(run, compiler_options=QUICK_COMPILE)(params)


def _forward(cfg: ModelConfig, params: Any) -> jax.Array:
    """What `_decode` gives, from one pass over whole rows."""
    graphdef, _, _ = abstract_model(cfg)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)

    def run(params):
        model = nnx.merge(graphdef, params)
        return model(jnp.array(TOKENS), positions, jnp.ones_like(positions))

    hidden = jax.jit(run, compiler_options=QUICK_COMPILE)(params)
    index = LENGTHS[:, None] - 1 + jnp.arange(NUM_STEPS + 1)
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


class CachedDecodeTest(parameterized.TestCase):
    @parameterized.named_parameters((name, *case) for name, case in CASES.items())
    def test_equals_forward(self, kinds, overrides):
        cfg = tiny_model_config(kinds, **overrides)
        params = random_params(cfg)
        # The shortest cache: the last block is not whole.
        decoded = _decode(cfg, params, TOKENS.shape[1])
        chex.assert_trees_all_close(decoded, _forward(cfg, params), atol=2e-5, rtol=2e-5)

    @parameterized.named_parameters(("asa", ("local", "global")), ("nsa", ("nsa",)))
    def test_bfloat16_rounds_no_worse_than_forward(self, kinds):
        # All blocks are selected: rounding may well change which are the most important.
        exact = tiny_model_config(kinds, num_selected_blocks=8)
        rounded = tiny_model_config(kinds, num_selected_blocks=8, compute_dtype="bfloat16")
        params = random_params(exact)
        want = _forward(exact, params)
        decoded = jnp.abs(_decode(rounded, params, 128) - want)
        forward = jnp.abs(_forward(rounded, params) - want)
        self.assertLess(jnp.mean(decoded), 1.2 * jnp.mean(forward))
        self.assertLess(jnp.max(decoded), 2 * jnp.max(forward))
