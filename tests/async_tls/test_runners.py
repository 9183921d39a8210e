"""Whole models decoded by every decoder, through the same generation as full attention."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest

from asa_jax.async_tls import device_model, runners
from asa_jax.async_tls.engine import Counters
from asa_jax.async_tls.generation_options import SparseOptions
from asa_jax.async_tls.runners import make_runner
from asa_jax.async_tls.settings import BACKENDS, DEFAULTS, decoding_config, key_shape
from asa_jax.async_tls.transfers import TransferError
from asa_jax.config import config_from_dict
from asa_jax.data.tokenizer import ByteTokenizer
from asa_jax.decoding.generate import Generator
from asa_jax.decoding.settings import Sampling
from asa_jax.errors import ConfigError, UserError
from configs import base
from tests.async_tls.gathers import can_gather
from tests.models import random_params, tiny_model_config

VOCAB = ByteTokenizer().vocab_size
LAYERS = 2
# Blocks of 4; 40 tokens have 10, of which 3 are always kept.
WHOLE = {"block_size": 4, "num_blocks": 16, "token_budget": 64, "num_dense_layers": 1}
SMALL = {**WHOLE, "num_blocks": 2, "token_budget": 6}
PROMPTS = [list(range(3, 40)), list(range(90, 111))]
TOKENS = 12


@functools.cache
def model(kind):
    cfg = tiny_model_config((kind,) * LAYERS, vocab_size=VOCAB, scan_layers=kind == "full")
    return cfg, random_params(cfg)


def generator(kind, decoder, **fields):
    cfg, params = model(kind)
    settings = decoding_config({**DEFAULTS, **fields}, cfg)
    options = SparseOptions(decoder, settings, None, False)
    runner = make_runner(options, cfg, params, VOCAB, 64) if decoder != "full" else None
    config = dataclasses.replace(config_from_dict(base.get_config().to_dict()), model=cfg)
    return Generator(config, params, ByteTokenizer(), chunk_tokens=64, runner=runner)


def drawn(generator, prompts=PROMPTS):
    parts = generator.stream_tokens(prompts, max_tokens=TOKENS, sampling=Sampling(0.0))
    return np.concatenate(list(parts), axis=1)


@pytest.mark.parametrize("kind", ["mla", pytest.param("full", marks=pytest.mark.slow)])
def test_all_blocks_at_level_1_from_the_host_are_double_sparsity_from_memory(kind):
    every = {**SMALL, "num_blocks": 16, "lagged": False}
    one, compiled = generator(kind, "async_tls", **every), runners._next_tokens._cache_size()
    text = drawn(one)
    # The first steps have the program of the later ones.
    assert runners._next_tokens._cache_size() == compiled + 1
    np.testing.assert_array_equal(text, drawn(generator(kind, "double_sparsity", **SMALL)))
    figures = one.runner.figures
    assert figures.tokens == 2 * TOKENS and figures.counters.hits > 0
    assert f"{2 * TOKENS} tokens, " in figures.describe()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "mla"])
def test_budgets_that_cover_the_text_give_full_attention(kind):
    full = drawn(generator(kind, "full"))
    for decoder in ("quest", "double_sparsity", "oracle_topk", "async_tls"):
        np.testing.assert_array_equal(drawn(generator(kind, decoder, **WHOLE)), full)


@pytest.mark.slow
@pytest.mark.parametrize("lagged", [True, False])
@pytest.mark.parametrize("kind", ["full", "mla"])
def test_both_forms_by_every_back_end(kind, lagged):
    every = [b for b in BACKENDS[1:] if b != "ffi_gather" or can_gather()]
    made = [generator(kind, "async_tls", **SMALL, backend=b, lagged=lagged) for b in every]
    texts = [drawn(one) for one in made]
    for text in texts[1:]:
        np.testing.assert_array_equal(texts[0], text)
    assert (texts[0] != drawn(generator(kind, "full"))).any()
    assert all(one.runner.figures.counters.misses > 0 for one in made)
    assert made[0].runner.backend_line == f"async_tls: back end {every[0]}"


def test_a_pool_of_one_row_stays_where_it_is():
    """Of one text with one key head: XLA made a copy of such a pool."""
    if not can_gather():
        pytest.skip("needs a compiler")
    by_host, by_device = (
        drawn(generator("mla", "async_tls", **SMALL, backend=backend), PROMPTS[:1])
        for backend in ("simulated", "ffi_gather")
    )
    np.testing.assert_array_equal(by_device, by_host)


def test_layers_of_other_kinds_and_wrong_sizes_are_refused():
    for kinds, message in (
        (("local", "global"), "model.layer_kinds: global, local: sparse decoding takes"),
        (("full", "mla"), "model.layer_kinds: full, mla: sparse decoding takes"),
    ):
        with pytest.raises(ConfigError, match=message):
            key_shape(tiny_model_config(kinds))
    cfg, _ = model("full")
    for fields, message in (
        ({"num_channels": 18}, "num_channels = 18: must be at most 16"),
        ({"num_dense_layers": 3}, "num_dense_layers = 3: must be at most 2"),
        ({"backend": "pinned"}, "backend = 'pinned': must be one of auto, ffi_gather"),
        ({"token_budget": 9000}, "token_budget = 9000: must be at most num_blocks"),
    ):
        with pytest.raises(ConfigError, match=message):
            decoding_config({**DEFAULTS, **fields}, cfg)


def test_text_on_the_host_cannot_be_read_on_and_too_little_memory_is_told(monkeypatch):
    one = generator("full", "async_tls", **SMALL)
    monkeypatch.setattr("asa_jax.async_tls.offloaded_model.system_available_bytes", lambda: 10**4)
    with pytest.raises(UserError, match="need 32768 bytes of host memory and 10000 are free"):
        drawn(one)
    state = one.runner.shapes(64)._replace(cache=None)
    with pytest.raises(UserError, match="cannot be read on"):
        one.runner.read(state, np.zeros((1, 64), np.int32), 0, np.array([3]))


def test_an_exchange_that_fails_is_told_and_the_next_text_is_decoded(monkeypatch):
    if not can_gather():
        pytest.skip("needs a compiler")

    class Closed(device_model.PinnedBlocks):
        def __init__(self, *args):
            super().__init__(*args)
            self._library.AsaClose(self._device)

    one = generator("full", "async_tls", **SMALL, backend="ffi_gather")
    monkeypatch.setattr(device_model, "PinnedBlocks", Closed)
    with pytest.raises(UserError, match=r"async_tls: .*exchange of blocks: .* is closed"):
        drawn(one)
    monkeypatch.undo()
    host = generator("full", "async_tls", **SMALL, backend="simulated")
    np.testing.assert_array_equal(drawn(one), drawn(host))
    figures, wanted = one.runner.figures.counters, host.runner.figures.counters
    assert figures.to_host_bytes == wanted.to_host_bytes > 0
    assert figures.hits > 0 and figures.misses > 0


def test_a_transfer_that_stands_still_does_not_stand_in_the_way_of_the_next_text():
    class StandsStill:
        def close(self):
            raise TransferError("a gather of blocks does not end, its memory stays")

    model = generator("full", "async_tls", **SMALL).runner._model
    model._backends, model._engines = [StandsStill()], [SimpleNamespace(counters=Counters(hits=3))]
    with pytest.raises(TransferError, match="does not end"):
        model.load([], np.ones(1))
    model.load([], np.ones(1))
    assert model.figures.counters == Counters(hits=3)
