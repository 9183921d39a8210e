"""Copying of identifiers: which count and how they are scored; training data of tasks."""

import json

import numpy as np
import pytest

from asa_jax.data.shards import open_token_folder
from asa_jax.data.tokenizer import load_tokenizer
from asa_jax.evaluation.scorer import TokenScores
from asa_jax.flags import PROJECT
from experiments import copying, tasks
from experiments.copying import Measured, Occurrence, find_occurrences, measure, summarise

TEXTS = [" ", "foo", "_bar", "_baz", ";", " dev", "a", "_b", "return", "x"]
SPACE, FOO, BAR, BAZ, END, DEV, A, B, RETURN, X = range(len(TEXTS))


def occurrences(*tokens: int) -> list[Occurrence]:
    return find_occurrences(np.array(tokens), TEXTS)


def test_first_and_second_occurrence():
    found = occurrences(FOO, BAR, BAZ, END, SPACE, DEV, BAR, BAZ, END)
    # ' dev_bar_baz' ends as 'foo_bar_baz' does: its tail is what is copied.
    assert found == [Occurrence(0, 3, None), Occurrence(5, 8, 5)]


def test_third_occurrences_do_not_count():
    name = (FOO, BAR, BAZ, END)
    assert [o.distance for o in occurrences(*name, *name, *name)] == [None, 4]


@pytest.mark.parametrize(
    "tokens",
    [
        (A, B, END),  # two tokens
        (RETURN, SPACE, X, END),  # no identifier
        (FOO, BAR, BAZ, END),  # once
    ],
)
def test_no_second_occurrence(tokens):
    assert all(o.distance is None for o in occurrences(*tokens))


def test_scores_are_of_all_tokens_but_the_first():
    nll = np.arange(8, dtype=np.float32)  # of tokens 1 .. 8
    correct = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)
    found = measure([Occurrence(0, 3, None), Occurrence(4, 7, 4)], TokenScores(nll, correct))
    # Tokens 1 and 2 are scores 0 and 1; tokens 5 and 6 are scores 4 and 5.
    assert found == [Measured(None, 1.0, 0.5), Measured(4, 1.0, 4.5)]


def test_groups_by_distance():
    groups = summarise([Measured(None, 0, 3.0), Measured(256, 1, 1.0), Measured(300, 0, 2.0)])
    assert [(g["distance"], g["count"], g["exact"]) for g in groups] == [
        (None, 1, 0.0), ((0, 256), 1, 1.0), ((256, 512), 1, 0.0)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A token folder with the bundled tokenizer."""
    from asa_jax.data import prepare

    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_text("Some words to read.\n" * 20)
    text = str(folder / "text.txt")
    arguments = ["--input", text, "--validation-input", str(PROJECT / "texts/validation/*.jsonl")]
    tokenizer = str(PROJECT / "texts" / "tokenizer.json")
    prepare.prepare(
        prepare.parse([*arguments, "--tokenizer", tokenizer, "--output", str(folder / "tokens")])
    )
    return folder / "tokens"


def test_tasks_become_a_token_folder(tokens, tmp_path):
    arguments = [f"--tokens={tokens}", "--tasks=single_noise,associative_recall"]
    arguments += [f"--output={tmp_path}", "--samples=6", "--min_length=256", "--max_length=512"]
    tasks.main(arguments)
    folder = open_token_folder(tmp_path)
    assert (folder.total("train", "documents"), folder.total("validation", "documents")) == (6, 64)
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
    needles = [r for r in records if "Remember this: the number of the" in r["prompt"]]
    assert len(needles) == 3 and all(len(r["text"]) == 8 for r in needles)
    # The same tokens as in the evaluation: pieces of text are joined where no token crosses.
    (shard,) = folder.split("train")
    sizes = np.diff(shard.offsets) - 1
    assert np.all((sizes >= 240) & (sizes <= 520))
    assert np.all(shard.text_starts - shard.offsets[:-1] > 200)


def test_tasks_are_not_those_of_the_evaluation():
    tokenizer = load_tokenizer(PROJECT / "texts" / "tokenizer.json")
    first, second = (
        list(tasks.make_records(tokenizer, ["single_noise"], range(2), (128, 128), seed))
        for seed in (0, 1)
    )
    assert first != second
    again = list(tasks.make_records(tokenizer, ["single_noise"], range(1, 2), (128, 128), 0))
    assert again == first[1:]


def test_an_unknown_task_is_one_line(tokens, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tasks.main([f"--tokens={tokens}", "--tasks=needles", f"--output={tmp_path}"])
    assert "--tasks: 'needles' must be of" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--length=0", "--windows=0"])
def test_copying_of_nothing_is_one_line(flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        copying.main([f"--workdir={tmp_path}", f"--output={tmp_path}/copying.json", flag])
    assert capsys.readouterr().err == "error: --length and --windows: must be positive\n"
