"""The token folder: what `prepare` writes and training reads.

    manifest.json                  written last; without it the folder is not finished
    tokenizer.json                 copy of the tokenizer, unless it is 'bytes'
    train-00000.bin                uint16 or uint32 little-endian token ids; the end-of-document
                                   token ends every document
    train-00000.offsets.npy        int64 [documents + 1], where each document starts, then the end;
                                   if some have a prompt, which is read and not learnt, int64
                                   [2, documents + 1]: where each starts, and where its text does
    validation-00000.bin, ...

Shards are memory-mapped. Sizes and offsets are checked when a folder is opened; token ids and the
size of the file on every read, so that a file truncated during training is a named error. Only a
truncation in the microseconds between that check and the read ends the process (SIGBUS), and a
changed token that stays below the vocabulary size goes unseen: the manifest's sha256 tells.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from asa_jax.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from asa_jax.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")
MAX_MANIFEST_BYTES = 64 * 2**20
_SHARD_NAME = re.compile(r"(train|validation)-\d{5,9}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard as the manifest lists it.

    Attributes:
        name: file name without suffix, such as train-00000.
        tokens: ids in the .bin file, ends of documents included.
        documents: documents in it.
        text_bytes: UTF-8 bytes of the documents before tokenization.
        tokens_sha256: of the .bin file.
        offsets_sha256: of the .offsets.npy file.
    """

    name: str
    tokens: int
    documents: int
    text_bytes: int
    tokens_sha256: str
    offsets_sha256: str

    @property
    def split(self) -> str:
        return self.name.partition("-")[0]

    @property
    def tokens_file(self) -> str:
        return f"{self.name}.bin"

    @property
    def offsets_file(self) -> str:
        return f"{self.name}.offsets.npy"


def shard_from_json(record: Any, where: str) -> Shard:
    """Checks one shard record of a manifest or of the progress of `prepare`.

    Raises:
        DataError: a field is missing, of another type, or not a shard's name.
    """
    fields = {field.name: field.type for field in dataclasses.fields(Shard)}
    good = isinstance(record, dict) and {k: type(v) for k, v in record.items()} == fields
    if not good or not _SHARD_NAME.fullmatch(record["name"]):
        raise DataError(f"{where}: not a list of shards; delete the folder and prepare it again")
    return Shard(**record)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of at most MAX_MANIFEST_BYTES.

    Raises:
        DataError: it is missing, too large or no JSON object.
    """
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise DataError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error}); prepare the folder again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object; prepare the folder again")
    return content


class OpenShard:
    """A memory-mapped shard; `read` checks what it gives.

    Attributes:
        shard: its record.
        path: of the tokens.
        offsets: int64 [documents + 1], where each document starts, then the end.
        text_starts: int64 [documents], where the text of each starts, behind its prompt.
    """

    def __init__(self, folder: Path, shard: Shard, dtype: np.dtype, vocab_size: int) -> None:
        """Maps the tokens and loads the offsets.

        Raises:
            DataError: a file is missing or not as the manifest says.
        """
        self.shard = shard
        self.path = folder / shard.tokens_file
        self._vocab_size = vocab_size
        self._bytes = shard.tokens * dtype.itemsize
        check_file_size(self.path, self._bytes)
        # A plain array over the mapping: slices of the memmap class cost more than small reads.
        self._tokens = np.asarray(np.memmap(self.path, dtype, mode="r", shape=(shard.tokens,)))
        self.offsets, self.text_starts = _load_offsets(folder / shard.offsets_file, shard)

    def read(self, start: int, length: int) -> np.ndarray:
        """Token ids start .. start + length - 1, int32 [length].

        Raises:
            DataError: the file was truncated, or holds an id beyond the vocabulary.
        """
        check_file_size(self.path, self._bytes)
        tokens = self._tokens[start : start + length]
        if tokens.size and tokens.max() >= self._vocab_size:
            index = int(np.argmax(tokens >= self._vocab_size))
            raise DataError(
                f"{self.path}: token id {tokens[index]} at byte "
                f"{(start + index) * tokens.itemsize} is not below the vocabulary size "
                f"{self._vocab_size}; prepare it again"
            )
        return tokens.astype(np.int32)


def _load_offsets(path: Path, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    try:
        rows = np.atleast_2d(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); prepare it again") from None
    documents = shard.documents
    whole = rows.dtype == np.int64 and rows.shape in ((1, documents + 1), (2, documents + 1))
    if not whole or not _are_starts(rows[0], rows[-1, :-1], shard.tokens):
        raise DataError(f"{path}: not the starts of {documents} documents; prepare it again")
    return rows[0], rows[-1, :-1]


def _are_starts(offsets: np.ndarray, text_starts: np.ndarray, tokens: int) -> bool:
    # A text has a token at least, and the end of the document comes after it.
    whole = offsets[0] == 0 and offsets[-1] == tokens
    return whole and bool(np.all((text_starts >= offsets[:-1]) & (text_starts <= offsets[1:] - 2)))


@dataclasses.dataclass(frozen=True)
class TokenFolder:
    """An opened token folder.

    Attributes:
        path: the folder.
        dtype: of the ids on disk.
        vocab_size: ids are below it.
        end_of_document_id: the last token of every document.
        end_of_document: its text.
        tokenizer_fingerprint: sha256 of the tokenizer, or 'bytes'.
        shards: of every split, in order.
    """

    path: Path
    dtype: np.dtype
    vocab_size: int
    end_of_document_id: int
    end_of_document: str
    tokenizer_fingerprint: str
    shards: tuple[Shard, ...]

    def split(self, name: str) -> list[OpenShard]:
        """Maps the shards of 'train' or 'validation'.

        Raises:
            DataError: the split is empty, or a file is not as the manifest says.
        """
        shards = [shard for shard in self.shards if shard.split == name]
        if not shards:
            raise DataError(
                f"{self.path}: no {name} documents; prepare it with --validation-input or a larger "
                "--validation-fraction"
            )
        return [OpenShard(self.path, shard, self.dtype, self.vocab_size) for shard in shards]

    def total(self, split: str, field: str) -> int:
        """Sum of 'tokens', 'documents' or 'text_bytes' over the shards of a split."""
        return sum(getattr(shard, field) for shard in self.shards if shard.split == split)

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that the folder was made with.

        Raises:
            DataError: the copy of the tokenizer is missing or was changed.
        """
        if self.tokenizer_fingerprint == BYTES:
            return load_tokenizer(BYTES)
        tokenizer = load_tokenizer(self.path / TOKENIZER, self.end_of_document)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise DataError(
                f"{self.path / TOKENIZER}: not the tokenizer that made the shards (sha256 "
                f"{tokenizer.fingerprint[:12]}, manifest {self.tokenizer_fingerprint[:12]})"
            )
        return tokenizer


def open_token_folder(path: str | Path) -> TokenFolder:
    """Opens a token folder and checks its manifest and the size of every shard file.

    Raises:
        DataError: it is not a finished token folder, or a file is missing or truncated.
    """
    path = Path(path)
    where = path / MANIFEST
    if not where.exists():
        raise DataError(f"{path}: no {MANIFEST}; make it with python -m asa_jax.data.prepare")
    manifest = read_json(where)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{where}: format version {manifest.get('format_version')}, expected {FORMAT_VERSION}; "
            "prepare it again"
        )
    try:
        folder = TokenFolder(
            path=path,
            dtype=token_dtype(int(manifest["vocab_size"])),
            vocab_size=int(manifest["vocab_size"]),
            end_of_document_id=int(manifest["end_of_document_id"]),
            end_of_document=str(manifest["end_of_document"]),
            tokenizer_fingerprint=str(manifest["tokenizer_fingerprint"]),
            shards=tuple(shard_from_json(shard, str(where)) for shard in manifest["shards"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: {error!r}; prepare the folder again") from None
    for shard in folder.shards:
        check_file_size(path / shard.tokens_file, shard.tokens * folder.dtype.itemsize)
    return folder


def check_file_size(path: Path, expected: int) -> None:
    """Compares a file's size with the manifest.

    Raises:
        DataError: it is missing or of another size; a half token counts.
    """
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if found != expected:
        raise DataError(f"{path}: expected {expected} bytes, found {found}; prepare it again")


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32, little-endian."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")
