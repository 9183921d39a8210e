"""The report: numbers in the tables and the JSON, pictures of what was measured alone."""

import io
import json
import math

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from asa_jax.evaluation.plots import mean_table
from asa_jax.evaluation.report import print_report, write_report
from asa_jax.evaluation.results import (
    AnswerResult,
    ChoiceResult,
    HarnessResult,
    PerplexityResult,
    PositionBucket,
    standard_error,
)


def _perplexity(length, bits):
    bucket = PositionBucket(
        first=0, last=length - 1, tokens=9, text_bytes=8, nats=7, bits_per_byte=bits
    )
    return PerplexityResult(
        source="book.txt", length=length, tokens=12345, text_bytes=8, nats=7, bits_per_byte=bits,
        perplexity_per_token=33.25, perplexity_per_byte=2**bits, buckets=[bucket],
    )  # fmt: skip


def _answer(task, length, depth, exact):
    return AnswerResult(
        task=task, length=length, depth=depth, samples=4, exact_match=exact,
        exact_match_error=standard_error(exact, 4), answers_right=exact, answer_nats=1.5,
    )  # fmt: skip


PERPLEXITY = [_perplexity(512, 1.875), _perplexity(1024, math.nan)]
ANSWERS = [
    _answer("single_text", 512, 0.0, 1.0),
    _answer("single_text", 512, 1.0, 0.5),
    _answer("single_text", 1024, 0.0, 0.25),
    _answer("frequent_words", 512, None, 0.125),
    _answer("kv.jsonl", None, None, 0.375),
]
CHOICES = [
    ChoiceResult(
        task="piqa", examples=1838, accuracy=0.61, accuracy_error=0.011, accuracy_norm=0.62,
        accuracy_norm_error=0.012, chance=0.5, perplexity=None,
    ),
    ChoiceResult(
        task="lambada", examples=7, accuracy=0.3, accuracy_error=0.1, accuracy_norm=None,
        accuracy_norm_error=None, chance=None, perplexity=42.5,
    ),
]  # fmt: skip
HARNESS = [HarnessResult(task="piqa", metric="acc", value=0.61, error=0.011)]


def test_tables_show_the_numbers():
    output = io.StringIO()
    print_report([*PERPLEXITY, *ANSWERS, *CHOICES, *HARNESS], Console(width=120, file=output))
    lines = {" ".join(line.split()) for line in output.getvalue().splitlines()}
    assert lines >= {
        "book.txt 512 12,345 1.875 33.25 3.668",
        # The mean over depths, 25% at 1,024, nothing under 'file'.
        "single_text 75.0% 1.50 25.0% 1.50",
        "frequent_words 12.5% 1.50",
        "kv.jsonl 37.5% 1.50",
        "piqa 1,838 61.0% ± 1.1% 62.0% ± 1.2% 50.0%",
        "lambada 7 30.0% ± 10.0% 42.5",
        "piqa acc 0.6100 0.0110",
    }


def test_json_holds_everything_and_no_nan(tmp_path):
    results = [*PERPLEXITY, *ANSWERS, *CHOICES, *HARNESS]
    paths = write_report(results, {"step": 3}, "run", tmp_path / "evaluation")
    content = json.loads(paths[0].read_text(), parse_constant=pytest.fail)
    assert content["step"] == 3
    assert content["versions"]["jax"]
    assert content["perplexity"][0]["buckets"][0]["bits_per_byte"] == 1.875
    assert content["perplexity"][1]["bits_per_byte"] is None
    assert content["answers"][1]["exact_match"] == 0.5
    assert content["choices"][1]["perplexity"] == 42.5
    assert content["lm_eval"][0]["value"] == 0.61


def test_pictures_are_drawn_of_what_was_measured(tmp_path):
    names = {path.name for path in write_report([*PERPLEXITY, *ANSWERS], {}, "run", tmp_path)}
    assert names == {"results.json", "bits_per_byte.png", "tasks.png", "depths.png"}
    for path in tmp_path.glob("*.png"):
        assert np.ptp(matplotlib.image.imread(path)[..., :3]) > 0.5
    # Those of the evaluation before are gone.
    names = {path.name for path in write_report(CHOICES, {}, "run", tmp_path)}
    assert names == {"results.json", "choices.png"} == {path.name for path in tmp_path.iterdir()}


def test_the_overview_averages_over_depths():
    table = mean_table(ANSWERS, ["single_text", "frequent_words"], [512, 1024])
    np.testing.assert_array_equal(table, [[0.75, 0.25], [0.125, np.nan]])
