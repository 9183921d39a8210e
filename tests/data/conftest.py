"""Token folders for the data tests."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from asa_jax.data.prepare import parse, prepare
from asa_jax.data.shards import TokenFolder, open_token_folder

WriteFolder = Callable[..., TokenFolder]


def _jsonl(path: Path, documents: Sequence[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


@pytest.fixture(scope="session")
def write_folder() -> WriteFolder:
    """Makes a token folder of bytes: write_folder(path, train=[...], validation=[...])."""

    def write(
        path: Path, train: Sequence[str], validation: Sequence[str] = (), *options: str
    ) -> TokenFolder:
        path.mkdir(parents=True, exist_ok=True)
        arguments = ["--input", _jsonl(path / "train.jsonl", train)]
        if validation:
            arguments += ["--validation-input", _jsonl(path / "validation.jsonl", validation)]
        else:
            arguments += ["--validation-fraction", "0"]
        arguments += ["--tokenizer", "bytes", "--output", str(path / "tokens"), *options]
        prepare(parse(arguments))
        return open_token_folder(path / "tokens")

    return write
