"""Tokenizers: any Hugging Face `tokenizer.json`, or plain bytes."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from asa_jax.errors import ConfigError, DataError

BYTES = "bytes"
MAX_TOKENIZER_BYTES = 128 * 2**20
# How GPT-2 and Qwen, Llama 3, DeepSeek, Llama 2 and Mistral, Gemma and BERT end a document.
END_OF_DOCUMENT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
    "[EOS]",
    "[SEP]",
)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer(Protocol):
    """What the data pipeline, the losses and the sampler need of a tokenizer.

    Attributes:
        vocab_size: one more than the largest token id.
        end_of_document_id: id of the token that ends every document.
        end_of_document: text of that token.
        end_ids: ids after which no more is drawn; a tuned model has some of its own.
        start_ids: ids that a prompt begins with; none where documents are packed without.
        fingerprint: sha256 of the tokenizer file, or 'bytes'.
        source: text of the tokenizer.json, or None for bytes.
    """

    vocab_size: int
    end_of_document_id: int
    end_of_document: str
    end_ids: tuple[int, ...]
    start_ids: tuple[int, ...]
    fingerprint: str
    source: str | None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens are neither added nor recognised in the text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text as a uint32 array; uses every core."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens; broken UTF-8 becomes U+FFFD."""

    def byte_lengths(self) -> np.ndarray:
        """Bytes of UTF-8 text each token stands for, int32 [V]; 0 for special tokens."""


class ByteTokenizer:
    """The 256 bytes of UTF-8 and an end of document: needs no file."""

    vocab_size = 257
    end_of_document_id = 256
    end_of_document = "<|endoftext|>"
    end_ids: tuple[int, ...] = (256,)
    start_ids: tuple[int, ...] = ()
    fingerprint = BYTES
    source: str | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)


class JsonTokenizer:
    """A `tokenizer.json` as Hugging Face's `tokenizers` reads it."""

    def __init__(self, source: str, name: str, end_of_document: str | None = None) -> None:
        """Parses the tokenizer and finds its end of document.

        Args:
            source: content of the tokenizer.json.
            name: how errors call it, usually its path.
            end_of_document: text of the token that ends a document; None tries the usual names.

        Raises:
            DataError: it is no tokenizer.
            ConfigError: no such end-of-document token.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{name}: not a tokenizer.json ({error})") from None
        # Text that spells a special token must not end a document in its middle.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.source: str | None = source
        self.fingerprint = hashlib.sha256(source.encode()).hexdigest()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        self.end_of_document = self._find_end_of_document(name, end_of_document)
        self.end_of_document_id = self._id(self.end_of_document)
        self.end_ids: tuple[int, ...] = (self.end_of_document_id,)
        self.start_ids: tuple[int, ...] = ()

    def published_start(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer.json puts before a text, such as Llama's."""
        text = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        starts = range(len(whole) - len(text) + 1)
        return tuple(whole[: next((i for i in starts if whole[i : i + len(text)] == text), 0)])

    def _id(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        return -1 if index is None else index

    def _find_end_of_document(self, name: str, wanted: str | None) -> str:
        for candidate in END_OF_DOCUMENT_NAMES if wanted is None else (wanted,):
            if self._id(candidate) >= 0:
                return candidate
        if wanted is not None:
            raise ConfigError(f"{name}: has no token {wanted!r} (--end-of-document)")
        special = [token for token in self._added_tokens() if token.special]
        known = ", ".join(token.content for token in special[:8]) or "none"
        raise ConfigError(
            f"{name}: no end-of-document token among the usual names; name one with "
            f"--end-of-document (special tokens: {known})"
        )

    def _added_tokens(self) -> list[Any]:
        return list(self._tokenizer.get_added_tokens_decoder().values())

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def byte_lengths(self) -> np.ndarray:
        """Bytes of UTF-8 text each token stands for, int32 [V]; 0 for special tokens.

        Exact for byte-level BPE (GPT-2, Qwen, Llama 3, DeepSeek), whose vocabulary spells each
        byte as one character; for others, what the token adds when it is decoded after another.
        """
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        if _is_byte_level(json.loads(self._tokenizer.to_str())["decoder"]):
            known = {index: len(token) for token, index in vocabulary.items()}
        else:
            known = self._decoded_lengths(vocabulary)
        for index, token in self._tokenizer.get_added_tokens_decoder().items():
            known[index] = 0 if token.special else len(token.content.encode())
        lengths = np.zeros(self.vocab_size, np.int32)
        lengths[list(known)] = list(known.values())
        return lengths

    def _decoded_lengths(self, vocabulary: dict[str, int]) -> dict[int, int]:
        # Decoders strip the space before a first token, so each is decoded after an anchor.
        anchor = next(i for t, i in vocabulary.items() if t.isascii() and t.isalpha())
        before = len(self._tokenizer.decode([anchor]).encode())
        texts = self._tokenizer.decode_batch([[anchor, index] for index in vocabulary.values()])
        return {
            index: 1 if _BYTE_TOKEN.fullmatch(token) else len(text.encode()) - before
            for (token, index), text in zip(vocabulary.items(), texts, strict=True)
        }


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    return decoder["type"] == "ByteLevel" or any(map(_is_byte_level, decoder.get("decoders", ())))


def load_tokenizer(path: str | Path, end_of_document: str | None = None) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        path: a tokenizer.json, or 'bytes'.
        end_of_document: text of the token that ends a document; None tries the usual names.

    Raises:
        DataError: the file is missing, too large or no tokenizer.
        ConfigError: no end-of-document token.
    """
    if str(path) == BYTES:
        return ByteTokenizer()
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_TOKENIZER_BYTES + 1)
        if len(content) > MAX_TOKENIZER_BYTES:
            raise DataError(f"{path}: larger than {MAX_TOKENIZER_BYTES} bytes, no tokenizer.json")
        source = content.decode()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a tokenizer.json, byte {error.start} is not UTF-8") from None
    return JsonTokenizer(source, str(path), end_of_document)


def check_vocabulary(vocab_size: int, model_vocab_size: int, whose: str) -> None:
    """Raises a ConfigError unless a model has a row for each of `vocab_size` tokens.

    Args:
        vocab_size: of tokens that the model is to read.
        model_vocab_size: of the model.
        whose: names what has the tokens.
    """
    if vocab_size > model_vocab_size:
        raise ConfigError(
            f"config.model.vocab_size = {model_vocab_size}: must be at least {vocab_size}, the "
            f"vocabulary of {whose}"
        )


class StreamingDecoder:
    """Turns tokens into text as they come, and holds back characters that are not whole yet."""

    # A character has at most 4 bytes, so more tokens than this only end in U+FFFD if it is real.
    _MAX_HELD_TOKENS = 4

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last piece given out, then what is held back
        self._num_given = 0

    def push(self, token: int) -> str:
        """Adds one token and returns the text that is complete with it, often ''."""
        self._ids.append(int(token))
        text = self._held_text()
        held = len(self._ids) - self._num_given
        if text.endswith("\ufffd") and held <= self._MAX_HELD_TOKENS:
            return ""
        return self._give(text)

    def flush(self) -> str:
        """Returns what is held back, broken or not, at the end of the stream."""
        return self._give(self._held_text())

    def _held_text(self) -> str:
        # Decoders may strip a leading space: decode behind the last piece, then cut that off.
        given = self._tokenizer.decode(self._ids[: self._num_given])
        return self._tokenizer.decode(self._ids)[len(given) :]

    def _give(self, text: str) -> str:
        self._ids = self._ids[self._num_given :]
        self._num_given = len(self._ids)
        return text
