"""Windows, positions and the measures on numbers worked out by hand."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asa_jax.data.prepare import parse, prepare
from asa_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from asa_jax.errors import ConfigError, DataError
from asa_jax.evaluation.perplexity import (
    EncodedText,
    Source,
    choose_windows,
    perplexity_jobs,
    text_sources,
    validation_sources,
)
from asa_jax.flags import PROJECT
from tests.evaluation.fakes import FakeScorer

TEXTS = ["abcdefgh", "ij", "klmnopqrstuvwxyz"]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    length=st.integers(1, 12),
)
def test_windows_predict_each_token_but_the_first_once(sizes, length):
    text = EncodedText(ByteTokenizer(), ["x" * size for size in sizes])
    windows = choose_windows([text], length, 10**9)
    predicted = np.zeros(text.offsets[-1], int)
    for window in windows:
        assert 2 <= window.tokens <= length + 1
        predicted[window.start + 1 : window.start + window.tokens] += 1
    expected = np.ones_like(predicted)
    expected[text.offsets[:-1]] = 0
    np.testing.assert_array_equal(predicted, expected)


def test_a_bound_takes_windows_spread_over_the_text():
    text = EncodedText(ByteTokenizer(), ["x" * 1000])
    windows = choose_windows([text], 10, 200)
    assert [window.start for window in windows][:: len(windows) - 1] == [0, 990]
    assert sum(window.tokens - 1 for window in windows) == 200
    assert len(choose_windows([text], 10, 1)) == 1


@given(length=st.integers(2, 20), bucket=st.integers(1, 25), seed=st.integers(0, 99))
def test_buckets_add_up_to_the_whole(make_config, length, bucket, seed):
    tokenizer = ByteTokenizer()
    rng = np.random.default_rng(seed)
    scorer = FakeScorer(tokenizer, lambda token: (rng.exponential(), False))
    config = make_config(lengths=(length,), position_bucket_tokens=bucket).evaluation
    (job,) = perplexity_jobs(config, scorer, [Source("x", [EncodedText(tokenizer, TEXTS)])])
    (result,) = job.run()
    assert result.tokens == job.tokens == sum(map(len, TEXTS))
    assert result.text_bytes == result.tokens - len(TEXTS)
    for name in ("tokens", "text_bytes"):
        assert sum(getattr(part, name) for part in result.buckets) == getattr(result, name)
    assert math.isclose(sum(part.nats for part in result.buckets), result.nats, rel_tol=1e-9)
    edges = [(part.first, part.last) for part in result.buckets]
    assert edges[0][0] == 0
    assert all(last + 1 == first for (_, last), (first, _) in itertools.pairwise(edges))
    assert edges[-1][1] == min(length, max(map(len, TEXTS))) - 1


def test_measures_by_hand(make_config):
    """'abc' and its end: three predictions of 1, 2 and 3 nats, of two bytes."""
    nats = {ord("b"): 1.0, ord("c"): 2.0, 256: 3.0}
    scorer = FakeScorer(ByteTokenizer(), lambda token: (nats[token], False))
    config = make_config(lengths=(8,), position_bucket_tokens=2).evaluation
    source = Source("abc.txt", [EncodedText(scorer.tokenizer, ["abc"])])
    (result,) = perplexity_jobs(config, scorer, [source])[0].run()
    assert (result.source, result.length, result.tokens, result.text_bytes) == ("abc.txt", 8, 3, 2)
    assert result.bits_per_byte == pytest.approx(6 / math.log(2) / 2)
    assert result.perplexity_per_token == pytest.approx(math.exp(2))
    assert result.perplexity_per_byte == pytest.approx(math.exp(3))
    assert [part.nats for part in result.buckets] == [3.0, 3.0]
    assert result.buckets[0].bits_per_byte == pytest.approx(3 / math.log(2) / 2)
    # The last bucket predicts the end of the document alone, which has no bytes.
    assert math.isnan(result.buckets[1].bits_per_byte)


def test_bytes_are_those_of_the_tokens(uniform, make_config, tmp_path):
    """With the bundled tokenizer the bytes of a text are its length but for the first token."""
    tokenizer = load_tokenizer(PROJECT / "texts" / "tokenizer.json")
    path = tmp_path / "text.txt"
    path.write_text("The naïve café — 漢字 and more plain words follow here.\n")
    (source,) = text_sources([path], tokenizer)
    scorer = FakeScorer(tokenizer, lambda token: (1.0, False))
    (result,) = perplexity_jobs(make_config(lengths=(7,)).evaluation, scorer, [source])[0].run()
    assert result.text_bytes == path.stat().st_size - len("The")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"ab\xffc", "invalid UTF-8 at byte 2")],
)
def test_bad_text_is_named(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"text\.txt: {message}"):
        text_sources([path], ByteTokenizer())
    with pytest.raises(DataError, match="no such file"):
        text_sources([tmp_path / "none.txt"], ByteTokenizer())


def _prepare(folder, tokenizer, validation):
    for name, text in (("train", "abc"), ("validation", validation)):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    arguments = ["--input", str(folder / "train.jsonl"), "--tokenizer", tokenizer]
    arguments += ["--validation-fraction", "0", "--output", str(folder / "tokens")]
    if validation:
        arguments += ["--validation-input", str(folder / "validation.jsonl")]
    prepare(parse(arguments))
    return str(folder / "tokens")


def test_the_validation_split_is_read_from_the_token_folder(tmp_path, oracle, make_config):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = _prepare(tmp_path / "a", "bytes", "hello there")
    second = _prepare(tmp_path / "b", "bytes", "")
    (source,) = validation_sources([first, second], oracle.tokenizer)
    (result,) = perplexity_jobs(make_config(lengths=(4,)).evaluation, oracle, [source])[0].run()
    assert result.tokens == len("hello there")
    assert result.bits_per_byte == 0
    with pytest.raises(DataError, match="no validation documents; give a text with --text"):
        validation_sources([second], oracle.tokenizer)
    with pytest.raises(DataError, match=r"none: no manifest\.json.*; or give a text with --text"):
        validation_sources([f"{second}/none"], oracle.tokenizer)


def test_a_token_folder_of_another_tokenizer_is_refused(tmp_path):
    folder = _prepare(tmp_path, str(PROJECT / "texts" / "tokenizer.json"), "hello")
    with pytest.raises(ConfigError, match="another tokenizer"):
        validation_sources([folder], ByteTokenizer())
