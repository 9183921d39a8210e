"""Tokenizes documents in order into rounds of shards; after each round the progress is on disk.

A round is one shard a split, all closed at the same document, so that one position says where to
go on. Shards and positions are the same however often the work was interrupted.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asa_jax.data.progress import show_progress
from asa_jax.data.shard_writer import ShardWriter, write_json
from asa_jax.data.shards import SPLITS, token_dtype
from asa_jax.data.sources import read_documents
from asa_jax.data.tokenizer import Tokenizer

PROGRESS = "progress.json"
# A document is the work of one thread, so a batch holds enough long ones for every core. The
# tokenizer needs about 50 bytes of memory for each character.
BATCH_CHARACTERS = 1_000_000 * max(4, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a folder is made of; equal requests give equal folders.

    Attributes:
        files: [name, bytes, version, split], the first three as in `sources.InputFile`; split is
            'train', 'validation' or 'hash'.
        text_field: field with the text in JSONL and Parquet records.
        prompt_field: field with what is read before it and not learnt; None: there is none.
        validation_fraction: share of the documents of 'hash' files that go to validation.
        shard_tokens: a round ends at this many tokens.
        tokenizer_fingerprint: sha256 of the tokenizer, or 'bytes'.
        end_of_document: text of the token that ends a document.
    """

    files: list[list[Any]]
    text_field: str
    prompt_field: str | None
    validation_fraction: float
    shard_tokens: int
    tokenizer_fingerprint: str
    end_of_document: str


@dataclasses.dataclass
class State:
    """How far a folder is, as of its last finished round.

    Attributes:
        shards: records of the finished shards, as in the manifest.
        file: index of the file to go on with.
        record: index of the document in it to go on with.
        skipped: empty documents so far.
    """

    shards: list[dict[str, Any]]
    file: int = 0
    record: int = 0
    skipped: int = 0


class _Item(NamedTuple):
    """A document on its way; `file` and `record` are where the one after it is."""

    split: str
    prompt: str
    text: str
    text_bytes: int
    file: int
    record: int
    done_bytes: int


def write_rounds(output: Path, request: Request, state: State, tokenizer: Tokenizer) -> None:
    """Tokenizes what `state` has left of the request, and brings `state` to its end.

    Args:
        output: the token folder.
        request: the input.
        state: where to start; holds every shard when done.
        tokenizer: encodes batches of documents on every core.

    Raises:
        DataError: a document cannot be read.
        OSError: the disk is full; the shards of `state` are kept.
    """
    tokens = sum(shard["tokens"] for shard in state.shards)
    total_bytes = sum(size for _, size, _, _ in request.files)
    with (
        show_progress(total_bytes, "tokens") as report,
        _Round(output, request, state, tokenizer) as current,
    ):
        for batch in _batches(_documents(request, state)):
            prompts = tokenizer.encode_batch([item.prompt for item in batch])
            texts = tokenizer.encode_batch([item.text for item in batch])
            for item, prompt, text in zip(batch, prompts, texts, strict=True):
                current.add(item, prompt, text)
                tokens += len(prompt) + len(text) + 1
                if current.tokens >= request.shard_tokens:
                    current.commit()
            report(batch[-1].done_bytes, tokens)
        current.commit()


def _documents(request: Request, state: State) -> Iterator[_Item]:
    done_bytes = 0
    first_file, first_record = state.file, state.record
    for index, (path, size, _, file_split) in enumerate(request.files):
        fields = request.text_field, request.prompt_field
        documents = read_documents(path, *fields) if index >= first_file else ()
        for record, document in enumerate(documents):
            if index > first_file or record >= first_record:
                prompt, text = document.prompt, document.text
                content = (prompt + text).encode()
                split = _split(content, request) if file_split == "hash" else file_split
                done = done_bytes + document.bytes_read
                yield _Item(split, prompt, text, len(content), index, record + 1, done)
        done_bytes += size


def _split(content: bytes, request: Request) -> str:
    # By content: a document that occurs twice is in one split.
    share = int.from_bytes(hashlib.sha256(content).digest()[:8]) / 2**64
    return "validation" if share < request.validation_fraction else "train"


def _batches(items: Iterator[_Item]) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(item.prompt) + len(item.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Round(contextlib.AbstractContextManager["_Round"]):
    """The shards being written, one a split; what is not committed is dropped on leaving."""

    def __init__(self, output: Path, request: Request, state: State, tokenizer: Tokenizer) -> None:
        self._output = output
        self._request = request
        self._state = state
        self._tokenizer = tokenizer
        self._writers: dict[str, ShardWriter] = {}
        self._next = dataclasses.replace(state)

    def __exit__(self, *exc_info: object) -> None:
        for writer in self._writers.values():
            writer.discard()

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self._writers.values())

    def add(self, item: _Item, prompt: np.ndarray, text: np.ndarray) -> None:
        self._next.file, self._next.record = item.file, item.record
        if len(text) == 0 or not item.text.strip():
            self._next.skipped += 1
            return
        if item.split not in self._writers:
            self._writers[item.split] = self._open(item.split)
        self._writers[item.split].append(prompt, text, item.text_bytes)

    def _open(self, split: str) -> ShardWriter:
        number = sum(shard["name"].startswith(split) for shard in self._state.shards)
        dtype = token_dtype(self._tokenizer.vocab_size)
        end = self._tokenizer.end_of_document_id
        return ShardWriter(self._output, f"{split}-{number:05d}", dtype, end)

    def commit(self) -> None:
        """Finishes the shards, then says so in the progress file."""
        for split in SPLITS:
            if split in self._writers:
                shard = self._writers[split].commit()
                self._state.shards.append(dataclasses.asdict(shard))
        self._writers = {}
        self._state.file, self._state.record = self._next.file, self._next.record
        self._state.skipped = self._next.skipped
        request, state = dataclasses.asdict(self._request), dataclasses.asdict(self._state)
        write_json(self._output / PROGRESS, {"request": request, "state": state})
