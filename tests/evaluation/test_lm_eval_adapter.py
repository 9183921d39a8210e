"""lm-eval gives what the native scoring gives."""

import json
import math

import pytest

pytest.importorskip("lm_eval", reason="needs the extra: pip install -e '.[eval]'")

from asa_jax.errors import DataError
from asa_jax.evaluation.lm_eval_adapter import HarnessModel, cut, harness_job
from asa_jax.evaluation.multiple_choice import choice_job
from tests.evaluation.fakes import FakeScorer


class _Request:
    def __init__(self, *args):
        self.args = args


class _Generator:
    """Continues every prompt by its last letter, then a line break and more."""

    def __init__(self):
        self.calls = []

    def encode_prompt(self, prompt):
        return list(prompt.encode()) or [10]

    def stream(self, prompts, *, max_tokens, sampling):
        self.calls.append((len(prompts), max_tokens, sampling.temperature))
        yield [prompt[-1] for prompt in prompts]
        yield ["\nmore" for _ in prompts]
        raise AssertionError("goes on after all have stopped")


@pytest.fixture
def model(tokenizer):
    """A byte costs its number over 100; the argmax is any lower-case letter or space."""
    scorer = FakeScorer(tokenizer, lambda byte: (byte / 100, byte >= 97 or byte == 32))
    return HarnessModel(scorer, _Generator(), 4)


def test_loglikelihood_moves_spaces_to_the_continuation(model):
    results = model.loglikelihood([_Request("ab ", "c"), _Request("", "B"), _Request("ab", " c")])
    expected = [(-1.31, True), (-0.66, False), (-1.31, True)]
    assert [(round(value, 4), greedy) for value, greedy in results] == expected


def test_rolling_predicts_every_token_once(model):
    for text in ("a", "abcd", "abcdefghijk"):
        (value,) = model.loglikelihood_rolling([_Request(text)])
        assert value == pytest.approx(-sum(text.encode()) / 100)


def test_generation_stops_at_its_stops(model):
    greedy, sampled = {"until": ["\n"]}, {"until": "\n", "do_sample": True, "temperature": 0.5}
    requests = [_Request("x", greedy)] * 17 + [_Request("y", {**sampled, "max_gen_toks": 9})]
    assert model.generate_until(requests) == ["x"] * 17 + ["y"]
    assert model._generator.calls == [(16, 256, 0.0), (1, 256, 0.0), (1, 9, 0.5)]
    assert cut("a b c", ["c", " b"]) == "a"


def test_all_kinds_score_as_natively(model, tmp_path):
    scorer = model._scorer
    files = {
        "piqa": [
            {"query": "Question: x?", "choices": ["aaa", "zz"], "gold": gold} for gold in (0, 1, 1)
        ],
        "winogrande": [
            {"context_options": ["a", "b"], "continuation": "cd", "gold": gold} for gold in (0, 1)
        ],
        "lambada-words": [
            {"context": "I do", "continuation": "know"}, {"context": "It is", "continuation": "Mr."}
        ],
    }  # fmt: skip
    paths = []
    for name, rows in files.items():
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {(r.task, r.metric): r for r in harness_job(paths, scorer, model, None).run()}
    piqa, winogrande, words = (choice_job(path, scorer, None).run()[0] for path in paths)
    assert found["piqa", "acc"].value == piqa.accuracy == pytest.approx(2 / 3)
    assert found["piqa", "acc"].error == piqa.accuracy_error
    assert found["piqa", "acc_norm"].value == piqa.accuracy_norm == pytest.approx(1 / 3)
    assert found["winogrande", "acc"].value == winogrande.accuracy
    assert found["lambada_words", "acc"].value == words.accuracy == 0.5
    assert math.isclose(found["lambada_words", "perplexity"].value, words.perplexity, rel_tol=1e-6)
    assert len(found) == 5


def test_mixed_kinds_and_equal_names_are_refused(model, tmp_path):
    rows = [{"context": "a", "continuation": "b"}, {"query": "q", "choices": ["a", "b"], "gold": 0}]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="x: its lines are of different kinds"):
        harness_job([path], model._scorer, model, None).run()
    with pytest.raises(DataError, match="another file gives a task of the same name, x"):
        harness_job([path, path], model._scorer, model, None)
