"""Scorers that cheat, and a small config."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from asa_jax.config import Config, config_from_dict
from asa_jax.data.tokenizer import ByteTokenizer
from asa_jax.evaluation.retrieval import Haystack
from configs import base
from tests.evaluation.fakes import FakeScorer
from tests.models import tiny_model_config

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def oracle(tokenizer) -> FakeScorer:
    """Knows every token."""
    return FakeScorer(tokenizer, lambda token: (0.0, True))


@pytest.fixture(scope="session")
def uniform(tokenizer) -> FakeScorer:
    """Gives every token the same probability; the argmax of equal logits is token 0."""
    nats = float(np.log(tokenizer.vocab_size))
    return FakeScorer(tokenizer, lambda token: (nats, token == 0))


@pytest.fixture(scope="session")
def haystack(tokenizer) -> Haystack:
    """Sentences of some twenty bytes, all different."""
    text = " ".join(f"Line {i} says little." for i in range(500))
    return Haystack(tokenizer, text, "text")


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """make_config(kinds, **evaluation) for a small model over bytes."""

    def make(kinds: tuple[str, ...] = ("sliding",), **evaluation: Any) -> Config:
        values = base.get_config().to_dict()
        values["model"] = dataclasses.asdict(tiny_model_config(kinds, vocab_size=260))
        values["data"]["sequence_length"] = 64
        values["training"]["loss_chunk_tokens"] = 100
        values["evaluation"] |= {"batch_tokens": 1024, **evaluation}
        return config_from_dict(values)

    return make
