"""Conversations: turns against the whole text at once, interrupts, stop strings, cache files."""

import copy
import dataclasses
import functools
import signal

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from asa_jax.data.tokenizer import ByteTokenizer
from asa_jax.decoding.conversation import Conversation
from asa_jax.decoding.generate import Generator
from asa_jax.decoding.settings import Sampling
from asa_jax.errors import CheckpointError, ConfigError, UserError
from tests.models import random_params

TOKENIZER = ByteTokenizer()
END = TOKENIZER.end_of_document_id
DRAWING = Sampling(0.9, top_p=0.9, repetition_penalty=1.1)
MAX_TOKENS = 18
# They end anywhere in blocks and query groups. The last is longer than a chunk and than the cache.
TURNS = (
    "It is a truth universally acknowledged, that a single man in possession",
    "",
    "of",
    "a good fortune, must be in want of a wife. However little known the feelings",
)


@pytest.fixture(scope="module")
def generator(make_config):
    config = make_config()
    return Generator(config, random_params(config.model), TOKENIZER, chunk_tokens=64)


@pytest.fixture
def conversation(generator):
    """After a turn of 71 tokens and 18 drawn ones."""
    started = Conversation(generator)
    _answer(started, TURNS[0])
    return started


def _answer(conversation, text, **kwargs):
    parts = conversation.answer(text, max_tokens=MAX_TOKENS, sampling=DRAWING, **kwargs)
    return "".join(parts)


def _read_at_once(generator, tokens, seed=0):
    """What a text is continued with, up to the end of the document."""
    drawn = generator.stream_tokens([tokens], max_tokens=MAX_TOKENS, sampling=DRAWING, seed=seed)
    row = np.concatenate(list(drawn), axis=1)[0].tolist()
    return row[: row.index(END)] if END in row else row


def _content(path):
    """Every bit of a cache file, in an order."""
    with safetensors.safe_open(path, framework="numpy") as file:
        names = sorted(file.keys())
        return file.metadata(), [(name, file.get_tensor(name).tobytes()) for name in names]


def test_turns_are_as_the_whole_text_read_at_once(generator):
    conversation, text = Conversation(generator), []
    for seed, turn in enumerate(TURNS):
        answer = _answer(conversation, turn, seed=seed)
        text += generator.encode_prompt(turn)
        want = _read_at_once(generator, text, seed)
        text += want
        assert conversation.tokens == text
        assert answer == TOKENIZER.decode(want)
    assert len(text) > 128 + 64


def test_the_token_that_ends_an_answer_is_not_among_those_that_the_text_has(generator, tmp_path):
    conversation = Conversation(generator)
    _answer(conversation, TURNS[0])
    drawn = conversation.tokens[len(TURNS[0]) :]
    end = next(token for token in drawn[1:] if token not in (*TURNS[0].encode(), drawn[0]))
    ending = copy.copy(generator)
    ending.tokenizer = ByteTokenizer()
    ending.tokenizer.end_ids = (END, end)
    conversation = Conversation(ending)
    _answer(conversation, TURNS[0])
    assert conversation.tokens[len(TURNS[0]) :] == drawn[: drawn.index(end)]
    conversation.save(tmp_path / "cache")
    (seen,) = safetensors.numpy.load_file(tmp_path / "cache")["seen"]
    assert np.flatnonzero(seen).tolist() == sorted(set(conversation.tokens))


def test_answer_that_is_not_taken_to_its_end_stays_as_far_as_it_was_drawn(generator):
    conversation = Conversation(generator)
    parts = conversation.answer(TURNS[0], max_tokens=40, sampling=DRAWING)
    next(parts)
    parts.close()
    text = conversation.tokens
    assert len(TURNS[0]) + 16 <= len(text) < len(TURNS[0]) + 40
    _answer(conversation, "of")
    text += TOKENIZER.encode("of")
    assert conversation.tokens == text + _read_at_once(generator, text)


def test_interrupt_while_reading_keeps_what_was_read(generator):
    def interrupt(done, total):
        assert (done, total) == (64, len(TURNS[0]))
        raise KeyboardInterrupt

    conversation = Conversation(generator)
    with pytest.raises(KeyboardInterrupt):
        _answer(conversation, TURNS[0], progress=interrupt)
    assert conversation.tokens == TOKENIZER.encode(TURNS[0])[:64]
    text = [*conversation.tokens, *b"of"]
    _answer(conversation, "of")
    assert conversation.tokens == text + _read_at_once(generator, text)


@pytest.fixture
def interruptible():
    """As from a terminal: what a shell starts in the background ignores SIGINT."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_at_any_call_loses_nothing(generator, monkeypatch):
    def interrupted(call, *args, **kwargs):
        result = call(*args, **kwargs)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return result

    conversation = Conversation(generator)
    for call in ("read", "draw", "fetch"):
        real = getattr(generator.runner, call)
        monkeypatch.setattr(generator.runner, call, functools.partial(interrupted, real))
        with pytest.raises(KeyboardInterrupt):
            _answer(conversation, "It is a truth ")
    text = conversation.tokens
    assert bytes(text).count(b"It is a truth ") == 3
    _answer(conversation, "of")
    text += TOKENIZER.encode("of")
    assert conversation.tokens == text + _read_at_once(generator, text)


def test_answer_ends_right_behind_a_stop_string(generator, conversation):
    tokens = conversation.tokens
    answer = bytes(_read_at_once(generator, [*tokens, *b"of"])).decode(errors="replace")
    stop = next(answer[i : i + 2] for i in range(4, len(answer)) if answer[i : i + 2].isascii())
    before = answer.partition(stop)[0]
    parts = list(
        conversation.answer("of", max_tokens=MAX_TOKENS, sampling=DRAWING, stop=["zzz", stop])
    )
    assert "".join(parts) == before
    new = conversation.tokens[len(tokens) + 2 :]
    assert bytes(new).decode(errors="replace") == before + stop


def test_a_saved_cache_goes_on_bit_for_bit(generator, conversation, tmp_path):
    paths = [tmp_path / name for name in ("first", "again", "talked", "loaded_talked")]
    first, again, talked, loaded_talked = paths
    conversation.save(first)
    loaded = Conversation.load(generator, first)
    assert loaded.tokens == conversation.tokens
    loaded.save(again)
    assert _content(first) == _content(again)
    assert _answer(loaded, "of", seed=1) == _answer(conversation, "of", seed=1)
    conversation.save(talked)
    loaded.save(loaded_talked)
    # Hidden states and caches, in every bit.
    assert _content(talked) == _content(loaded_talked)
    # As many tokens as there are, in whole blocks.
    arrays = safetensors.numpy.load_file(first)
    assert arrays["cache.0.1.latent"].shape[1] == -(-len(arrays["tokens"]) // 16) * 16
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_cache_is_saved_without_the_rows_that_a_mesh_needs(generator, tmp_path):
    padding = copy.copy(generator)
    padding.runner = copy.copy(generator.runner)
    padding.runner.num_rows = lambda num_texts: -(-num_texts // 2) * 2
    conversation = Conversation(padding)
    _answer(conversation, "It is")
    conversation.save(tmp_path / "cache")
    loaded = Conversation.load(padding, tmp_path / "cache")
    assert _answer(loaded, "of", seed=1) == _answer(conversation, "of", seed=1)
    assert Conversation.load(generator, tmp_path / "cache").tokens == loaded.tokens[:-20]


def test_interrupt_while_saving_leaves_no_file(conversation, tmp_path, monkeypatch):
    save = safetensors.numpy.save_file

    def interrupted(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversation.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_cache_files_that_cannot_be_used(make_config, generator, conversation, tmp_path):
    path = tmp_path / "cache"
    conversation.save(path)
    whole = path.read_bytes()

    def check(message, used=generator, content=whole):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as error:
            Conversation.load(used, path)
        assert str(path) in str(error.value)

    flipped = bytearray(whole)
    flipped[-100] ^= 1
    check("damaged, its digest does not match", content=bytes(flipped))
    check("is no cache file, or damaged", content=whole[:-1])
    check("is no cache file, or damaged", content=b"")
    check("is no cache of format", content=safetensors.numpy.save({"a": np.zeros(1)}))
    config = generator.config
    other = random_params(config.model, seed=1)
    check("was made by another weights", Generator(config, other, TOKENIZER))
    model = dataclasses.replace(config.model, rope_theta=1e6)
    config = dataclasses.replace(config, model=model)
    check("was made by another model", Generator(config, generator.runner.params, TOKENIZER))
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Conversation.load(generator, path)


def test_a_cache_that_cannot_be_saved(generator, conversation, tmp_path):
    with pytest.raises(UserError, match="there is no text yet"):
        Conversation(generator).save(tmp_path / "cache")
    with pytest.raises(UserError, match="cannot be written"):
        conversation.save(tmp_path / "missing" / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_turn_that_is_too_long_changes_nothing(generator, conversation):
    tokens = conversation.tokens
    with pytest.raises(ConfigError, match=f"prompt of {len(tokens) + 1} tokens"):
        conversation.answer("a", max_tokens=2**20 - len(tokens))
    assert conversation.tokens == tokens
