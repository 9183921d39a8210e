"""Prefill by chunks and step-by-step decoding against the forward pass, for every layer kind."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.model.cached_attention import Chunk
from asa_jax.model.transformer import MIN_ROWS, abstract_model
from tests.decoding.kind_cases import CASES
from tests.models import QUICK_COMPILE, random_params, tiny_model_config

# Prompts of one batch: around the window (12), blocks (16), a chunk (32) and query groups (4).
LENGTHS = np.array((1, 2, 3, 4, 11, 12, 13, 15, 16, 17, 31, 32, 33, 34, 35))
NUM_STEPS = 14
# What is appended between runs of steps, to caches that end anywhere in blocks and groups; the
# second time they have more blocks than a list.
APPENDED = np.array((40, 1, 17, 18, 0, 5, 34, 2, 16, 21, 3, 4, 1, 9, 14))
TOKENS = np.random.default_rng(1).integers(64, size=(15, 97), dtype=np.int32)
CHUNK = 32


class _Reader:
    """Reads and decodes rows of TOKENS, and keeps every hidden state by its position."""

    def __init__(self, cfg: ModelConfig, params: Any, cache_length: int) -> None:
        graphdef, _, _ = abstract_model(cfg)
        model = functools.partial(nnx.merge, graphdef)
        self.params, self.rows = params, np.arange(len(LENGTHS))
        self.held = np.zeros(len(LENGTHS), np.int32)
        self.hidden = np.full((*TOKENS.shape, cfg.hidden_size), np.nan, np.float32)
        self.cache = model(params).init_cache(len(LENGTHS), cache_length)

        def prefill(params, tokens, chunk, cache):
            return model(params).prefill(tokens, chunk, cache)

        def decode(params, held, cache):
            decoder = model(params)
            decoder.join()

            def step(cache, position):
                tokens = jnp.array(TOKENS)[self.rows, position]
                hidden, cache = decoder.decode(tokens, position, cache)
                return cache, hidden

            positions = held + jnp.arange(NUM_STEPS)[:, None]
            cache, hidden = jax.lax.scan(step, cache, positions)
            return hidden, cache

        self._prefill = jax.jit(prefill, compiler_options=QUICK_COMPILE)
        self._decode = jax.jit(decode, compiler_options=QUICK_COMPILE)

    def read(self, offset: int, lengths: np.ndarray) -> None:
        """Reads a chunk of rows that will have `lengths` tokens."""
        chunk = Chunk(jnp.int32(offset), jnp.array(self.held), jnp.array(lengths))
        positions = offset + np.arange(CHUNK)
        # What is not to be read must not matter.
        wanted = (self.held[:, None] <= positions) & (positions < lengths[:, None])
        tokens = np.where(wanted, TOKENS[:, offset : offset + CHUNK], 63)
        hidden, self.cache = self._prefill(self.params, tokens, chunk, self.cache)
        after = np.asarray(chunk.after(CHUNK))
        read = after > self.held
        self.hidden[self.rows[read], after[read] - 1] = hidden[read]
        self.held = after

    def decode(self) -> None:
        """Reads NUM_STEPS tokens of each row one by one."""
        hidden, self.cache = self._decode(self.params, jnp.array(self.held), self.cache)
        for state in np.asarray(hidden, np.float32):
            self.hidden[self.rows, self.held] = state
            self.held = self.held + 1


def _read_in_turns(cfg: ModelConfig, params: Any, cache_length: int) -> np.ndarray:
    """Hidden states [B, T, D] after prompts, steps, appended tokens and steps; else nan."""
    reader = _Reader(cfg, params, cache_length)
    for offset in (0, 32):
        reader.read(offset, LENGTHS)
    reader.decode()
    appended = reader.held + APPENDED
    for offset in (0, 16, 48):  # chunks may overlap
        reader.read(offset, appended)
    chex.assert_trees_all_equal(reader.held, appended)
    reader.decode()
    for offset in (16, 48, 64):
        reader.read(offset, appended + NUM_STEPS + 5)
    return reader.hidden


def _forward(cfg: ModelConfig, params: Any) -> jax.Array:
    """Hidden states [B, T, D] from one pass over whole rows."""
    graphdef, _, _ = abstract_model(cfg)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)

    def run(params):
        model = nnx.merge(graphdef, params)
        return model(jnp.array(TOKENS), positions, jnp.ones_like(positions))

    return jax.jit(run, compiler_options=QUICK_COMPILE)(params)


class CachedDecodeTest(parameterized.TestCase):
    @parameterized.named_parameters((name, *case) for name, case in CASES.items())
    def test_equals_forward(self, kinds, overrides):
        cfg = tiny_model_config(kinds, **overrides)
        params = random_params(cfg)
        # The shortest cache: the last block is not whole.
        got = _read_in_turns(cfg, params, TOKENS.shape[1])
        known = np.isfinite(got).all(-1)
        self.assertGreaterEqual(np.min(known.sum(1)), 2 * NUM_STEPS + 1)
        want = np.where(known[..., None], _forward(cfg, params), np.nan)
        chex.assert_trees_all_close(got, want, atol=2e-5, rtol=2e-5)

    @parameterized.named_parameters(("asa", ("local", "global")), ("nsa", ("nsa",)))
    def test_bfloat16_rounds_no_worse_than_forward(self, kinds):
        # All blocks are selected: rounding may well change which are the most important.
        exact = tiny_model_config(kinds, num_selected_blocks=8)
        rounded = tiny_model_config(kinds, num_selected_blocks=8, compute_dtype="bfloat16")
        params = random_params(exact)
        want = np.asarray(_forward(exact, params))
        got = _read_in_turns(rounded, params, 128)
        known = np.isfinite(got).all(-1)
        decoded = np.abs(got - want)[known]
        forward = np.abs(np.asarray(_forward(rounded, params), np.float32) - want)[known]
        self.assertLess(np.mean(decoded), 1.2 * np.mean(forward))
        self.assertLess(np.max(decoded), 2 * np.max(forward))

    def test_one_row_is_decoded_like_many(self):
        cfg = tiny_model_config(("local", "global", "full", "nsa"), queries_per_selection=2)
        model = nnx.merge(abstract_model(cfg)[0], random_params(cfg))
        hidden = []
        for num_rows in (1, MIN_ROWS + 1):

            def step(cache, position, num_rows=num_rows):
                tokens = jnp.full(num_rows, jnp.array(TOKENS)[0, position])
                state, cache = model.decode(tokens, jnp.full(num_rows, position), cache)
                return cache, state

            run = functools.partial(jax.lax.scan, step, model.init_cache(num_rows, 40))
            cache, states = jax.jit(run, compiler_options=QUICK_COMPILE)(jnp.arange(40))
            hidden.append((cache, states))
        first = jax.tree.map(lambda x: x[:1], hidden[1][0])
        chex.assert_trees_all_close(hidden[0][0], first, atol=2e-5)
        chex.assert_shape(hidden[0][1], (40, 1, cfg.hidden_size))
        chex.assert_trees_all_close(hidden[0][1][:, 0], hidden[1][1][:, -1], atol=2e-5)
