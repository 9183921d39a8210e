"""Choices scored on numbers worked out by hand, the format of prompts, and bad lines."""

import gzip
import json
import math

import numpy as np
import pytest

from asa_jax.errors import DataError
from asa_jax.evaluation.generated import key_value_job
from asa_jax.evaluation.multiple_choice import (
    Example,
    Request,
    RequestScore,
    choice_job,
    encode_requests,
    read_examples,
    score_encoded,
    summarise,
)
from tests.evaluation.fakes import FakeScorer


def _choices(gold, *texts):
    return Example(tuple(Request("Q", text) for text in texts), gold)


def _write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_normalisation_by_hand():
    """-2 nats over 1 byte lose to -4 over 4, and win without the division."""
    examples = [_choices(0, "a", "bbbb"), _choices(1, "a", "bbbb"), _choices(1, "a", "bbbb")]
    scores = [RequestScore(-2, False), RequestScore(-4, True)] * 3
    result = summarise("x", examples, scores)
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.accuracy_norm == pytest.approx(2 / 3)
    assert result.accuracy_error == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 3))
    assert result.accuracy_norm_error == result.accuracy_error
    assert (result.chance, result.perplexity, result.examples) == (0.5, None, 3)


def test_length_is_in_bytes_of_the_text_without_its_space():
    """'é' has two bytes: -1.6 / 2 beats -1.4 / 1, as it would not by characters."""
    scores = [RequestScore(-1.6, False), RequestScore(-1.4, False), RequestScore(-9, False)]
    result = summarise("x", [_choices(0, " é", "a", "b")], scores)
    assert result.accuracy_norm == 1
    assert result.chance == pytest.approx(1 / 3)


def test_one_continuation_after_several_contexts_needs_no_normalisation():
    example = Example((Request("Sarah", "won."), Request("Maria", "won.")), 1)
    result = summarise("x", [example], [RequestScore(-2, False), RequestScore(-1, False)])
    assert (result.accuracy, result.accuracy_norm) == (1, None)


def test_last_words_are_right_if_greedy():
    examples = [Example((Request("c", "w"),), None)] * 2
    result = summarise("x", examples, [RequestScore(-1.0, True), RequestScore(-3.0, False)])
    assert (result.accuracy, result.accuracy_norm, result.chance) == (0.5, None, None)
    assert result.perplexity == pytest.approx(math.exp(2))


def test_only_the_continuation_counts(tokenizer):
    """Each byte costs its number: ' ab' is 32 + 97 + 98; the argmax is any byte but a space."""
    scorer = FakeScorer(tokenizer, lambda token: (float(token), token != ord(" ")))
    (encoded,) = encode_requests(tokenizer, [Request("long context ", " ab")])
    assert tokenizer.decode(encoded[0]) == "long context ab"
    (score,) = score_encoded(scorer, [encoded])
    assert score == RequestScore(-(32.0 + 97 + 98), False)


@pytest.mark.parametrize(
    ("query", "prompt"),
    [
        ("Question: why?", "Question: why?\nAnswer:"),
        ("Question: why?\n", "Question: why?\nAnswer:"),
        ("Passage: x\nQuestion: why?\nAnswer:", "Passage: x\nQuestion: why?\nAnswer:"),
        ("A man sits", "A man sits"),
    ],
)
def test_a_question_is_closed(tmp_path, query, prompt):
    path = _write(tmp_path / "x.jsonl", {"query": query, "choices": ["a", "b"], "gold": 0})
    assert read_examples(path)[0].requests[0].context == prompt


def test_the_three_formats_are_read_and_scored(tmp_path, oracle, uniform):
    choices = {"query": "Q", "choices": ["aa", "b"], "gold": 1}
    options = {"context_options": ["Sarah", "Maria"], "continuation": "won.", "gold": 0}
    words = {"context": "I do not", "continuation": "know"}
    for row, accuracy, norm in ((choices, 1, 0), (options, 1, None), (words, 0, None)):
        path = _write(tmp_path / "set.v1.jsonl", row, row)
        job = choice_job(path, uniform, limit=1)
        (result,) = job.run()
        assert (result.task, result.examples) == ("set", 1)
        assert (result.accuracy, result.accuracy_norm) == (accuracy, norm)
    # ' know' is five tokens, each as likely as any.
    assert result.perplexity == pytest.approx(uniform.tokenizer.vocab_size**5, rel=1e-5)
    (best,) = choice_job(path, oracle, limit=None).run()
    assert (best.examples, best.accuracy, best.perplexity) == (2, 1, 1)


def test_gzip_is_read(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('\n{"context": "a", "continuation": "b"}\n')
    assert read_examples(path) == [Example((Request("a", "b"),), None)]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: cannot be read"):
        read_examples(path)


GOOD = b'{"context": "a", "continuation": "b"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "broken JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"context": "\xff"}', "invalid UTF-8 at byte 13 of the line"),
        (b'{"context": "\\ud800", "continuation": "b"}', "half a surrogate pair"),
        (b'{"answer": 1}', "not an example; expected the fields query, choices, gold;"),
        (b'{"context": "a"}', r"no field 'continuation' \(it has context\)"),
        (b'{"context": " ", "continuation": "b"}', "field 'context' = ' ': must be text"),
        (b'{"context": 3, "continuation": "b"}', "field 'context' = 3: must be text"),
        (b'{"query": "q", "choices": "ab", "gold": 0}', "field 'choices' = 'ab': must be a list"),
        (b'{"query": "q", "choices": ["a"], "gold": 0}', "field 'choices' .* a list of two"),
        (b'{"query": "q", "choices": ["a", ""], "gold": 0}', "field 'choices' .* none empty"),
        (b'{"query": "q", "choices": ["a", "b"]}', "no field 'gold'"),
        (b'{"query": "q", "choices": ["a", "b"], "gold": 2}', "'gold' = 2: .* from 0 to 1"),
        (b'{"query": "q", "choices": ["a", "b"], "gold": -1}', "'gold' = -1: .* from 0 to 1"),
        (b'{"query": "q", "choices": ["a", "b"], "gold": true}', "'gold' = True"),
        (b'{"query": "q", "choices": ["a", "b"], "gold": "a"}', "'gold' = 'a'"),
        (b'{"context_options": ["a", "b"], "gold": 0}', "no field 'continuation'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=rf"x\.jsonl:3: .*{message}"):
        read_examples(path)


def test_an_empty_file_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match=r"x\.jsonl: is empty"):
        read_examples(path)


def test_key_value_files_are_scored(tmp_path, oracle, uniform):
    pairs = [["k1", "v1"], ["k2", "v2"], ["k1", "v3"]]
    rows = [{"ordered_kv_records": pairs, "key": "k2", "value": "v2"}] * 3
    path = _write(tmp_path / "kv.jsonl", *rows)
    (result,) = key_value_job(path, oracle, limit=2).run()
    assert (result.task, result.length, result.depth) == ("kv.jsonl", None, None)
    assert (result.samples, result.exact_match) == (2, 1)
    (result,) = key_value_job(path, uniform, limit=None).run()
    assert (result.samples, result.exact_match) == (3, 0)
    assert result.answer_nats == pytest.approx(np.log(257))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ordered_kv_records": [["a"]]}, "'ordered_kv_records' .* a list of pairs"),
        ({"ordered_kv_records": []}, "'ordered_kv_records' .* a list of pairs"),
        ({"key": "other"}, "'key' = 'other': must be in ordered_kv_records"),
        ({"value": "other"}, "'key' = 'k': must be in ordered_kv_records, with the value"),
        ({"value": 3}, "'value' = 3"),
    ],
)
def test_a_bad_key_value_line_is_named(tmp_path, oracle, change, message):
    row = {"ordered_kv_records": [["k", "v"]], "key": "k", "value": "v"} | change
    with pytest.raises(DataError, match=rf"kv\.jsonl:1: .*{message}"):
        key_value_job(_write(tmp_path / "kv.jsonl", row), oracle, limit=None)
