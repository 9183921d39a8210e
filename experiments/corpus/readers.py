"""What of a package is text, and how it becomes text, for each part of the corpus."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from experiments.corpus.archives import Member
from experiments.corpus.html_text import html_to_text

_SOURCE_SUFFIXES = frozenset([".c", ".h", ".S", ".rs", ".py", ".sh", ".pl", ".rst", ".txt"])
_SOURCE_BYTES = range(200, 2_000_000)
# Tables of register addresses are half of the kernel's tree, and nearly random numbers.
_REGISTERS = re.compile(r"/include/asic_reg/|_(sh_mask|offset|default|enum|d)\.h$")

_MANUAL = re.compile(r"\.(x?html?|rst|txt|md|texi|adoc)(\.gz)?$")
_MANUAL_BYTES = range(500, 6_000_000)
# Pages that list or repeat what others say.
_LISTS = re.compile(
    r"genindex|modindex|index-all|allclasses|hierarchy|package-tree|constant-values|search|changelog"
    r"|_sources/|-members\.html|_source\.html|graph_legend|(functions|globals)_|/src/"
)
_LANGUAGES = (
    "ar|bg|ca|cs|da|de|el|es|et|eu|fa|fi|fr|gl|he|hr|hu|id|it|ja|ko|lt|lv|nb|nl|nn|pl|pt|ro|ru|sk"
    "|sl|sr|sv|tr|uk|vi|zh"
)
_TRANSLATION = re.compile(rf"[/.]({_LANGUAGES})([-_.][A-Za-z]{{2,4}})?(?=[/.])")

_BLANK_LINES = re.compile(r"\n{3,}")
_LINE_ENDS = re.compile(r"[ \t\r]+\n")
_TAG = re.compile(r"<[^>]+>")
_NAVIGATION_CHARACTERS = 40  # what is longer and comes again in a manual is navigation
_SHORTEST_PAGE = 300
_WHOLE_BOOK = "/data/data.txt"


class Page(NamedTuple):
    """The text of one file of a package.

    Attributes:
        group: pages with the same one belong together: their folder, or for a book its path.
        text: of the page.
    """

    group: str
    text: str


class Reader(NamedTuple):
    """How a part is read: which files, from path and bytes, and their pages."""

    wanted: Callable[[str, int], bool]
    pages: Callable[[Iterable[Member]], Iterator[Page]]


def _is_source(path: str, size: int) -> bool:
    name = PurePosixPath(path)
    build_file = name.name.startswith(("Kconfig", "Makefile"))
    known = name.suffix in _SOURCE_SUFFIXES or build_file
    return known and size in _SOURCE_BYTES and not _REGISTERS.search(path)


def _source_pages(members: Iterable[Member]) -> Iterator[Page]:
    for path, content in members:
        path = path.partition("/")[2] or path  # without the folder that names the release
        if text := _clean(_decode(content)):
            yield Page(_folder(path), f"// {path}\n{text}")


def _is_manual(path: str, size: int) -> bool:
    if not _MANUAL.search(path) or size not in _MANUAL_BYTES:
        return False
    return not _LISTS.search(path) and not _TRANSLATION.search(path)


def _manual_pages(members: Iterable[Member]) -> Iterator[Page]:
    # Menus come as paragraphs of short lines, copyrights as long ones.
    seen: dict[str, set[str]] = {"\n\n": set(), "\n": set()}
    # Sorted, because packages store files in no order of reading.
    for path, content in sorted(members):
        text = _without_repeats(_manual_text(path, content), seen)
        if len(text) >= _SHORTEST_PAGE:
            yield Page(_folder(path), text)


def _manual_text(path: str, content: bytes) -> str:
    if path.endswith(".gz"):
        try:
            content, path = gzip.decompress(content), path.removesuffix(".gz")
        except (OSError, EOFError, zlib.error):
            return ""
    text = _decode(content)
    if path.endswith(("html", "htm")):
        text = "" if 'http-equiv="refresh"' in text[:2000].lower() else html_to_text(text)
    return _clean(text)


def _without_repeats(text: str, seen: dict[str, set[str]]) -> str:
    for between, known in seen.items():
        kept = []
        for piece in text.split(between):
            if len(piece) > _NAVIGATION_CHARACTERS:
                if piece in known:
                    continue
                known.add(piece)
            kept.append(piece)
        text = between.join(kept)
    return _clean(text)


def _is_book(path: str, size: int) -> bool:
    if path.endswith(".txt"):
        return "/data/" in path
    return path.endswith(".json") and path.count("/") == 2 and "/data/" not in path


def _book_pages(members: Iterable[Member]) -> Iterator[Page]:
    found = sorted(members)
    # Beside its chapters one package has the whole book: read twice, one copy could be held out.
    whole = [member for member in found if member.path.endswith(_WHOLE_BOOK)]
    for path, content in whole or found:
        text = _decode(content)
        if path.endswith(".json"):
            text = "\n".join(_json_lines(json.loads(text), ()))
        if text := _clean(text):
            yield Page(path, text)


def _json_lines(value: Any, names: tuple[str, ...]) -> Iterator[str]:
    """One line a leaf: the names on the way to it, then its text; 'text' names nothing."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _json_lines(inner, names if name == "text" else (*names, name))
    elif value:
        yield f"{' / '.join(names)}: {_TAG.sub('', str(value))}"


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _decode(content: bytes) -> str:
    if b"\0" in content[:4096]:
        return ""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _clean(text: str) -> str:
    return _BLANK_LINES.sub("\n\n", _LINE_ENDS.sub("\n", text)).strip()


READERS = {
    "code": Reader(_is_source, _source_pages),
    "docs": Reader(_is_manual, _manual_pages),
    "books": Reader(_is_book, _book_pages),
}
