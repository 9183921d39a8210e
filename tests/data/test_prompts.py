"""Documents with prompts, which are read and not learnt: from files to the targets of batches."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from asa_jax.data.pipeline import NOT_LEARNT, validation_batches
from asa_jax.data.prepare import parse, prepare
from asa_jax.data.shards import TokenFolder, open_token_folder
from asa_jax.errors import DataError

END = 256
# Prompts of all lengths beside rows of 8 tokens, and none.
RECORDS = [{"prompt": "p" * n, "text": "text" * (1 + n % 3)} for n in (0, 1, 7, 8, 9, 20)]


def write(path: Path, *options: str) -> TokenFolder:
    """Makes a token folder with the documents of a file in both splits."""
    held_out, output = path.with_stem("held_out"), path.with_suffix("")
    shutil.copy(path, held_out)
    arguments = ["--input", str(path), "--validation-input", str(held_out), "--overwrite"]
    prepare(parse([*arguments, "--tokenizer", "bytes", "--output", str(output), *options]))
    return open_token_folder(output)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.mark.parametrize("shard_tokens", ["20", "1000"])
def test_targets_in_prompts_do_not_count(jsonl: Path, shard_tokens: str) -> None:
    folder = write(jsonl, "--prompt-field", "prompt", "--shard-tokens", shard_tokens)
    expected = []
    for record in RECORDS:
        tokens = np.array([*(record["prompt"] + record["text"]).encode(), END])
        learnt = np.arange(len(tokens)) >= len(record["prompt"])
        targets = np.where(learnt, tokens, NOT_LEARNT)
        for start in range(0, len(tokens) - 1, 8):
            pair = tokens[start:-1][:8], targets[start + 1 :][:8]
            expected.append(tuple(map(tuple, pair)))
    found = []
    for batch in validation_batches([folder], sequence_length=8, batch_size=1, alignment=8):
        read = batch["segment_ids"] > 0
        found.append((tuple(batch["inputs"][read]), tuple(batch["targets"][read])))
    assert sorted(found) == sorted(expected)
    size = sum(len(record["prompt"] + record["text"]) for record in RECORDS)
    assert folder.total("validation", "text_bytes") == size


def test_parquet_gives_what_jsonl_gives(jsonl: Path) -> None:
    columns = {name: [record[name] for record in RECORDS] for name in ("text", "prompt")}
    table = jsonl.with_suffix(".parquet")
    pa.parquet.write_table(pa.table(columns), table)
    shards = [write(path, "--prompt-field", "prompt").split("train")[0] for path in (jsonl, table)]
    assert shards[0].shard == shards[1].shard


def test_documents_without_prompts_are_stored_as_ever(jsonl: Path) -> None:
    folder = write(jsonl)
    assert np.load(folder.path / "train-00000.offsets.npy").ndim == 1
    (shard,) = folder.split("train")
    np.testing.assert_array_equal(shard.text_starts, shard.offsets[:-1])


def test_files_that_have_no_prompts_are_named(jsonl: Path) -> None:
    with pytest.raises(DataError, match=r"\.jsonl:1: no field 'question' .*--prompt-field"):
        write(jsonl, "--prompt-field", "question")
    text = jsonl.with_suffix(".txt")
    text.write_text("text")
    with pytest.raises(DataError, match=r"\.txt: a \.txt has no field 'prompt'"):
        write(text, "--prompt-field", "prompt")
