"""Pages of a package joined into long documents, each dealt to training or validation."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from experiments.corpus.readers import Page

SHORTEST_BYTES = 4_000
LONG_BYTES = 64_000  # a document this long ends with its group
LONGEST_BYTES = 1_000_000
_BETWEEN_PAGES = "\n\n"


class LongDocument(NamedTuple):
    """Pages that stood together.

    Attributes:
        group: of the first page.
        text: of all pages.
        text_bytes: of it in UTF-8.
    """

    group: str
    text: str
    text_bytes: int


def join_pages(pages: Iterable[Page]) -> Iterator[LongDocument]:
    """Joins neighbouring pages into documents of `SHORTEST_BYTES` to `LONGEST_BYTES`.

    Pages of one group stay together; small groups share a document with the next. What is shorter
    even so, at the end or before a very long page, is left out.

    Args:
        pages: in an order in which neighbours belong together.
    """
    texts: list[str] = []
    first = last = ""
    size = 0
    for group, text, text_bytes in _pieces(pages):
        ends = group != last and size >= LONG_BYTES
        if texts and (ends or size + text_bytes > LONGEST_BYTES):
            yield from _document(first, texts)
            texts, size = [], 0
        first, last = group if not texts else first, group
        texts.append(text)
        size += text_bytes + len(_BETWEEN_PAGES)
    yield from _document(first, texts)


def _document(group: str, texts: list[str]) -> Iterator[LongDocument]:
    text = _BETWEEN_PAGES.join(texts)
    text_bytes = len(text.encode())
    if text_bytes >= SHORTEST_BYTES:
        yield LongDocument(group, text, text_bytes)


def _pieces(pages: Iterable[Page]) -> Iterator[tuple[str, str, int]]:
    for group, text in pages:
        content = text.encode()
        if len(content) <= LONGEST_BYTES:
            yield group, text, len(content)
            continue
        for start in range(0, len(content), LONGEST_BYTES):
            # A character cut in two at the border is dropped.
            piece = content[start : start + LONGEST_BYTES].decode(errors="ignore")
            yield group, piece, len(piece.encode())


def place(text: str, seed: int, validation_fraction: float, shards: int) -> int | None:
    """Where a document goes, by its content and the seed alone: copies go to one place.

    Args:
        text: of the document.
        seed: another one deals anew.
        validation_fraction: share of documents held out.
        shards: of the training documents.

    Returns:
        The training shard, or None for validation.
    """
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    if int.from_bytes(digest[:8]) < validation_fraction * 2**64:
        return None
    return int.from_bytes(digest[8:16]) % shards
