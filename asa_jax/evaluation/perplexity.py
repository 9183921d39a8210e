"""Perplexity and bits per byte of real text, overall and by position in the window.

A document is cut into windows of `length` predictions. A window starts from nothing: its position p
is predicted from p + 1 tokens. Windows share one token, so that each token but a document's first
is predicted exactly once. With nats the sum of -log p(token) and bytes those of the predicted
tokens:

    bits per byte = nats / log 2 / bytes
    perplexity per token = exp(nats / tokens), per byte = 2^(bits per byte)
"""

import glob
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from asa_jax.config import EvaluationConfig
from asa_jax.data.shards import open_token_folder
from asa_jax.data.sources import find_files, read_documents
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import ConfigError, DataError
from asa_jax.evaluation.results import Job, PerplexityResult, PositionBucket, Result
from asa_jax.evaluation.scorer import Scorer, TokenScores


class Documents(Protocol):
    """Tokens of documents one after another; a shard of a token folder is one."""

    offsets: np.ndarray  # int64 [documents + 1]

    def read(self, start: int, length: int) -> np.ndarray:
        """Token ids start .. start + length - 1, int32 [length]."""


class Window(NamedTuple):
    """A stretch of one document: predictions + 1 tokens."""

    part: int
    start: int
    tokens: int


class Source(NamedTuple):
    """A text to measure: its name and its documents, in parts."""

    name: str
    parts: Sequence[Documents]


class EncodedText:
    """Documents of a text file, tokenized, each ended as those of a token folder are."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        end = np.array([tokenizer.end_of_document_id], np.int32)
        documents = [
            np.concatenate([ids.astype(np.int32), end]) for ids in tokenizer.encode_batch(texts)
        ]
        self.offsets = np.cumsum([0] + [len(document) for document in documents])
        self._tokens = np.concatenate(documents)

    def read(self, start: int, length: int) -> np.ndarray:
        """Token ids start .. start + length - 1, int32 [length]."""
        return self._tokens[start : start + length]


def text_sources(paths: Sequence[Path], tokenizer: Tokenizer) -> list[Source]:
    """Reads and tokenizes a user's .txt, .jsonl (field `text`) or .parquet files.

    Raises:
        DataError: one is missing, not UTF-8, or holds no text.
    """
    sources = []
    for path in find_files([glob.escape(str(path)) for path in paths]):
        texts = [document.text for document in read_documents(path, "text")]
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise DataError(f"{path}: is empty; give a file with text")
        sources.append(Source(path.name, [EncodedText(tokenizer, texts)]))
    return sources


def validation_sources(folders: Sequence[str], tokenizer: Tokenizer) -> list[Source]:
    """The validation splits of a run's token folders.

    Raises:
        DataError: a folder cannot be used, or none has validation documents.
        ConfigError: a folder was made with another tokenizer than the run's.
    """
    sources = []
    for path in folders:
        try:
            folder = open_token_folder(path)
        except DataError as error:
            raise DataError(f"{error}; or give a text with --text") from None
        if folder.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ConfigError(f"{path}: was prepared with another tokenizer than the run's")
        if folder.total("validation", "documents"):
            sources.append(Source(Path(path).name, folder.split("validation")))
    if not sources:
        raise DataError(f"{', '.join(folders)}: no validation documents; give a text with --text")
    return sources


def perplexity_jobs(cfg: EvaluationConfig, scorer: Scorer, sources: Sequence[Source]) -> list[Job]:
    """One job for each text and length of the config."""
    return [_job(cfg, scorer, source, length) for source in sources for length in cfg.lengths]


def _job(cfg: EvaluationConfig, scorer: Scorer, source: Source, length: int) -> Job:
    windows = choose_windows(source.parts, length, cfg.perplexity_tokens)

    def run() -> list[Result]:
        tokens = [source.parts[w.part].read(w.start, w.tokens) for w in windows]
        sums = sum_by_position(tokens, scorer.score(tokens), scorer.tokenizer.byte_lengths())
        return [summarise(source.name, length, cfg.position_bucket_tokens, sums)]

    total = sum(window.tokens - 1 for window in windows)
    return Job(f"perplexity of {source.name}, {length} tokens", total, run)


def choose_windows(parts: Sequence[Documents], length: int, max_tokens: int) -> list[Window]:
    """Cuts documents into windows, and takes evenly spread ones where there are more than wanted.

    Args:
        parts: the documents.
        length: predictions of a window; the last of a document has fewer.
        max_tokens: predictions in all, about.

    Returns:
        The windows in order.
    """
    windows = [
        Window(part, int(start), int(min(length, stop - 1 - start)) + 1)
        for part, documents in enumerate(parts)
        for first, stop in zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
        for start in range(first, stop - 1, length)
    ]
    total = sum(window.tokens - 1 for window in windows)
    count = max(1, min(len(windows), len(windows) * max_tokens // total))
    return [windows[i] for i in np.linspace(0, len(windows) - 1, count).round().astype(int)]


class PositionSums(NamedTuple):
    """Sums over windows, by position from the start of a window, each [length]."""

    tokens: np.ndarray
    text_bytes: np.ndarray
    nats: np.ndarray


def sum_by_position(
    windows: Sequence[np.ndarray], scores: Sequence[TokenScores], byte_lengths: np.ndarray
) -> PositionSums:
    """Adds up predictions, their bytes and their nats at each position of the windows."""
    longest = max(map(len, windows)) - 1
    sums = PositionSums(
        np.zeros(longest, np.int64), np.zeros(longest, np.int64), np.zeros(longest, np.float64)
    )
    for window, score in zip(windows, scores, strict=True):
        size = len(window) - 1
        sums.tokens[:size] += 1
        sums.text_bytes[:size] += byte_lengths[window[1:]]
        sums.nats[:size] += score.nll
    return sums


def summarise(source: str, length: int, bucket_tokens: int, sums: PositionSums) -> PerplexityResult:
    """Turns sums by position into the overall measures and buckets of positions."""
    tokens, text_bytes, nats = (column.sum().item() for column in sums)
    bits = bits_per_byte(nats, text_bytes)
    return PerplexityResult(
        source=source, length=length, tokens=tokens, text_bytes=text_bytes, nats=nats,
        bits_per_byte=bits, perplexity_per_token=float(np.exp(nats / tokens)),
        perplexity_per_byte=2**bits,
        buckets=[
            _bucket(sums, first, bucket_tokens) for first in range(0, len(sums.nats), bucket_tokens)
        ],
    )  # fmt: skip


def _bucket(sums: PositionSums, first: int, size: int) -> PositionBucket:
    tokens, text_bytes, nats = (column[first : first + size].sum().item() for column in sums)
    last = min(first + size, len(sums.nats)) - 1
    return PositionBucket(
        first=first, last=last, tokens=tokens, text_bytes=text_bytes, nats=nats,
        bits_per_byte=bits_per_byte(nats, text_bytes),
    )  # fmt: skip


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """nats / log 2 / bytes; not a number where only tokens without text were predicted."""
    return nats / math.log(2) / text_bytes if text_bytes else math.nan
