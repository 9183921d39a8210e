"""The text of an HTML page: what a reader reads, without navigation."""

import re
from html.parser import HTMLParser

_SKIPPED = frozenset(
    ("script", "style", "nav", "head", "footer", "form", "button", "svg", "noscript")
)
# Any other element ends a head, whose own end may be left out.
_IN_HEAD = frozenset(
    ("title", "base", "link", "meta", "style", "script", "noscript", "template", "object")
)
_ON_A_LINE = frozenset(
    ("p", "div", "li", "tr", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "pre",
     "table", "section", "article", "ul", "ol", "dl", "blockquote")
)  # fmt: skip
_SPACE = re.compile(r"\s+")


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._skipping: list[str] = []
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipping[-1:] == ["head"] and tag not in _IN_HEAD:
            self._skipping.pop()
        if tag in _SKIPPED:
            self._skipping.append(tag)
        self._preformatted += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipping:
            # What was left open inside ends with it.
            del self._skipping[self._skipping.index(tag) :]
        self._preformatted -= tag == "pre" and self._preformatted > 0
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.pieces.append(data if self._preformatted else _SPACE.sub(" ", data))

    def _break(self, tag: str) -> None:
        if tag in _ON_A_LINE:
            self.pieces.append("\n")


def html_to_text(page: str) -> str:
    """Text of a page: blocks on lines of their own, preformatted text as it is.

    Args:
        page: HTML, well formed or not.
    """
    parser = _Text()
    parser.feed(page)
    parser.close()
    return "".join(parser.pieces)
