"""Generated tasks: lengths, depths, and answers that the context really gives."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asa_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from asa_jax.errors import ConfigError, DataError
from asa_jax.evaluation.generated import (
    GENERATED_TASKS,
    TASKS_BY_DEPTH,
    generated_jobs,
    make_samples,
)
from asa_jax.evaluation.retrieval import Haystack, read_haystack
from asa_jax.flags import PROJECT
from tests.evaluation.fakes import FakeScorer

RECALL = ("key_value", "associative_recall")
# A record of two UUIDs in bytes, with quotes and ends.
RECORD_BYTES = 84


def _sample(name, haystack, length=2048, depth=0.5, seed=0):
    return GENERATED_TASKS[name](random.Random(seed), haystack, length, depth)


def _parts(name, haystack, **options):
    """Context and answers of a sample as text."""
    sample = _sample(name, haystack, **options)
    decode = haystack.tokenizer.decode
    context = decode(sample.tokens[: sample.answers[0].start])
    return context, [decode(sample.tokens[answer]).strip() for answer in sample.answers]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(GENERATED_TASKS)),
    length=st.integers(900, 4000),
    depth=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_length_is_respected(haystack, name, length, depth, seed):
    sample = _sample(name, haystack, length, depth, seed)
    assert sample.tokens.dtype == np.int32
    if name in RECALL:
        assert length - RECORD_BYTES < len(sample.tokens) <= length
    else:
        assert len(sample.tokens) == length
    starts = [span.start for span in sample.answers]
    stops = [span.stop for span in sample.answers]
    assert all(a < b for a, b in zip(starts, stops, strict=True))
    assert all(b < a for a, b in zip(starts[1:], stops[:-1], strict=True))
    assert stops[-1] == len(sample.tokens)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(TASKS_BY_DEPTH)),
    depth=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_the_needle_lies_at_its_depth(haystack, name, depth, seed):
    context, (answer,) = _parts(name, haystack, depth=depth, seed=seed, length=4096)
    mark = {"key_value": '\n"'}.get(name, " Remember")
    place = context.rindex(mark, 0, context.index(answer))
    # The last question follows the filler.
    filler = context[context.index("\n") : context.rindex("\n\n")]
    share = (place - context.index("\n")) / (len(filler) - RECORD_BYTES)
    # Off by a sentence and the other needles.
    assert abs(share - depth) < 0.11


@pytest.mark.parametrize(
    "name", ["single_noise", "single_text", "single_word", "single_uuid", "multi_key"]
)
def test_the_fact_that_is_asked_for_stands_in_the_context(name, haystack):
    context, (answer,) = _parts(name, haystack)
    kind, key = re.search(r"Answer: The (\w+) of the (.+) is$", context).groups()
    facts = re.findall(r"the (\w+) of the ([\w ]+) is ([\w-]+)\.", context)
    assert [value for *named, value in facts if named == [kind, key]] == [answer]
    assert len(facts) == (4 if name == "multi_key" else 1)


def test_multi_value_asks_for_all_values_in_order(haystack):
    context, answers = _parts("multi_value", haystack)
    assert re.findall(r"the number of the [\w ]+ is (\d+)\.", context) == answers
    assert len(set(answers)) == 4


def test_multi_query_asks_for_every_key(haystack):
    sample = _sample("multi_query", haystack)
    text = haystack.tokenizer.decode(sample.tokens)
    facts = dict(re.findall(r"Remember this: the number of the ([\w ]+) is (\d+)\.", text))
    asked = dict(re.findall(r"Answer: The number of the ([\w ]+) is (\d+)", text))
    assert asked == facts
    assert len(facts) == 4


@pytest.mark.parametrize("seed", range(10))
def test_variable_tracking_answers_are_the_chain(haystack, seed):
    context, answers = _parts("variable_tracking", haystack, seed=seed)
    values, order = {}, []
    for name, source in re.findall(r"Let (\w+) equal (\w+)\.", context):
        values[name] = values.get(source, source)
        order.append(name)
    wanted = re.search(r"Which variables equal (\d+)\?", context)[1]
    assert [name for name in order if values[name] == wanted] == answers
    assert len(order) == 8


@pytest.mark.parametrize("length", [700, 701, 750, 1000, 5000])
def test_frequent_words_are_the_most_frequent(haystack, length):
    context, answers = _parts("frequent_words", haystack, length=length)
    words = context[context.index("\n\n") : context.rindex("\n\n")].split()
    (first, a), (second, b), (third, c), (_, d) = Counter(words).most_common(4)
    assert [first, second, third] == answers
    assert a > b > c > d


def test_associative_recall_repeats_pairs(haystack):
    sample = _sample("associative_recall", haystack)
    lines = haystack.tokenizer.decode(sample.tokens).split()[-200:]
    pairs = [line.split(":") for line in lines if line.count(":") == 1 and line[-1] != ":"]
    given, queried = dict(pairs[:-8]), pairs[-8:]
    assert all(given[word] == number for word, number in queried)
    answers = [haystack.tokenizer.decode(sample.tokens[span]) for span in sample.answers]
    assert answers == [number for _, number in queried]


def test_key_value_answer_is_the_record(haystack):
    context, (answer,) = _parts("key_value", haystack)
    key = re.search(r'key "([\w-]+)" is "$', context)[1]
    assert dict(re.findall(r'"([\w-]+)": "([\w-]+)"', context))[key] == answer


@pytest.mark.parametrize("name", sorted(GENERATED_TASKS))
def test_samples_depend_on_the_seed_alone(name, haystack, make_config):
    def tokens(seed):
        config = make_config(seed=seed).evaluation
        return [s.tokens.tolist() for s in make_samples(config, name, 1500, 0.5, 2, haystack)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    first, second = tokens(1)
    assert first != second


def test_the_oracle_finds_all_and_the_uniform_model_nothing(
    oracle, uniform, haystack, make_config, tokenizer
):
    config = make_config(lengths=(1024,), depths=(0.0, 1.0), samples=2).evaluation
    for scorer, exact, nats in ((oracle, 1.0, 0.0), (uniform, 0.0, np.log(tokenizer.vocab_size))):
        counted = []
        scorer.on_tokens = counted.append
        jobs = generated_jobs(config, scorer, haystack)
        results = [result for job in jobs for result in job.run()]
        assert {result.exact_match for result in results} == {exact}
        assert {result.answers_right for result in results} == {exact}
        np.testing.assert_allclose([result.answer_nats for result in results], nats, rtol=1e-6)
        cells = [(result.task, result.depth, result.samples) for result in results]
        assert cells == [
            cell
            for name in config.tasks
            if name != "perplexity"
            for cell in (
                [(name, 0.0, 2), (name, 1.0, 2)] if name in TASKS_BY_DEPTH else [(name, None, 4)]
            )
        ]
        # The progress bar ends near its end.
        assert 0.9 < sum(counted) / sum(job.tokens for job in jobs) <= 1


def test_a_partly_right_answer_counts_in_part(haystack, make_config):
    """A model that knows the digits below 8 gives some numbers of many."""
    scorer = FakeScorer(haystack.tokenizer, lambda token: (1.0, token < ord("8")))
    config = make_config(lengths=(2048,), depths=(0.5,), samples=20, tasks=("associative_recall",))
    (result,) = generated_jobs(config.evaluation, scorer, haystack)[0].run()
    # Three digits below 8, the first not 0.
    assert result.answers_right == pytest.approx(7 / 9 * 0.8 * 0.8, abs=0.1)
    assert result.exact_match < result.answers_right
    expected = (result.exact_match * (1 - result.exact_match) / 20) ** 0.5
    assert result.exact_match_error == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(GENERATED_TASKS))
def test_a_length_too_short_is_told_before_anything_runs(name, haystack, oracle, make_config):
    config = make_config(lengths=(2048, 64), tasks=(name,)).evaluation
    with pytest.raises(ConfigError, match=r"lengths = \d+: too short .* at least \d+ tokens"):
        generated_jobs(config, oracle, haystack)


def test_every_task_fits_512_tokens_of_the_bundled_tokenizer():
    tokenizer = load_tokenizer(PROJECT / "texts" / "tokenizer.json")
    haystack = Haystack(tokenizer, "A sentence. Another one.", "text")
    for name in GENERATED_TASKS:
        sample = _sample(name, haystack, 486)
        # Pieces are tokenized one by one, and still spell the text.
        assert "\ufffd" not in tokenizer.decode(sample.tokens)


def test_bad_filler_is_named(tmp_path):
    path = tmp_path / "filler.txt"
    path.write_text("  \n")
    with pytest.raises(DataError, match=r"filler\.txt: is empty"):
        read_haystack(path, ByteTokenizer())
    path.write_bytes(b"abc \xff")
    with pytest.raises(DataError, match=r"filler\.txt: invalid UTF-8 at byte 4"):
        read_haystack(path, ByteTokenizer())
