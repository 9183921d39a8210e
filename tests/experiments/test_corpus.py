"""The corpus of long text, from tiny packages made here: pages, documents, splits, resuming."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asa_jax.data.sources import read_documents
from asa_jax.errors import DataError
from experiments.corpus import documents, download, make
from experiments.corpus.__main__ import main
from experiments.corpus.archives import Member, read_members
from experiments.corpus.build import build_package
from experiments.corpus.documents import join_pages, place
from experiments.corpus.html_text import html_to_text
from experiments.corpus.manifest import Corpus
from experiments.corpus.packages import PACKAGES, PARTS, Package
from experiments.corpus.readers import READERS, Page

ROOT = Path(__file__).parents[2]


def tar(files: dict[str, bytes], compression: str = "xz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def deb(path: Path, files: dict[str, bytes]) -> Path:
    members = {"debian-binary": b"2.0", "control.tar.xz": b"odd", "data.tar.xz": tar(files)}
    content = b"!<arch>\n"
    for name, data in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}`\n"
        content += header.encode() + data + b"\n" * (len(data) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def prose(number: int, size: int = 6_000) -> str:
    return "\n".join(f"Sentence {i} of page {number}." for i in range(size // 20))


SOURCES = {
    f"linux/{folder}/{i}.c": prose(i, 20_000).encode()
    for folder in ("kernel", "drivers/net", "fs")
    for i in range(4)
}
KERNEL = {
    "./usr/src/linux.tar.xz": tar(SOURCES | {"linux/fs/x_sh_mask.h": b"#define A 1\n" * 900}),
    "./usr/share/doc/kernel/copyright": b"Format: x\nLicense: GPL-2\n text\nLicense: LGPL-2.1\n",
}
MANUAL = {
    f"./usr/share/doc/guide/html/{i:02d}.html": f"<p>{prose(i)}</p>".encode() for i in range(20)
} | {"./usr/share/doc/guide/copyright": b"under the terms of the BSD licence"}
BOOK = {
    "package/package.json": b'{"license": "CC0-1.0"}',
    "package/europe/aa.json": json.dumps(
        {"Geography": {"Area": {"text": "<b>5</b> km"}, "Note": {"text": prose(1)}}}
    ).encode(),
    "package/data/1790.txt": prose(2, 9_000).encode(),
}
KERNEL_PACKAGE = Package("kernel", "code", "apt", shards=3)
GUIDE_PACKAGE = Package("guide", "docs", "apt")
BOOK_PACKAGE = Package("@some/book", "books", "npm")


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "packages"
    deb(folder / "kernel_1%3a6.1-2_all.deb", KERNEL)
    deb(folder / "guide_2.0_all.deb", MANUAL)
    (folder / "some-book-1.0.0.tgz").write_bytes(tar(BOOK, "gz"))
    return folder


def texts(corpus: Corpus, output: Path, split: str) -> list[tuple[str, str]]:
    """(part, text) of every document of a split."""
    return [
        (record["part"], document.text)
        for record in corpus.packages.values()
        for file in record["files"]
        if file["split"] == split
        for document in read_documents(output / file["name"], "text")
    ]


def test_packages_become_a_corpus_that_prepare_can_read(
    tmp_path: Path, archives: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_download", _unavailable)
    packages = [KERNEL_PACKAGE, GUIDE_PACKAGE, BOOK_PACKAGE, Package("gone", "docs", "apt")]
    output = tmp_path / "corpus"
    corpus = make.build_corpus(packages, output, archives, seed=0, workers=2)
    assert "gone: not available" in capsys.readouterr().err
    assert {name: r["licence"] for name, r in corpus.packages.items()} == {
        "kernel": "GPL-2; LGPL-2.1",
        "guide": "words of its copyright file: BSD",
        "@some/book": "CC0-1.0",
    }
    assert corpus.packages["kernel"]["archive"] == "kernel_1%3a6.1-2_all.deb"
    found = texts(corpus, output, "train") + texts(corpus, output, "validation")
    assert {part for part, _ in found} == set(PARTS)
    assert all(4_000 <= len(text.encode()) <= 1_000_000 for _, text in found)
    whole = {part: "\n".join(text for p, text in found if p == part) for part in PARTS}
    assert "// drivers/net/3.c\nSentence 0 of page 3." in whole["code"]
    assert "#define" not in whole["code"]
    assert "Sentence 299 of page 19." in whole["docs"] and "<p>" not in whole["docs"]
    assert "Geography / Area: 5 km" in whole["books"]
    files = [file for record in corpus.packages.values() for file in record["files"]]
    assert sum(file["text_bytes"] for file in files) == sum(len(t.encode()) for _, t in found)
    assert not list(output.glob("*/*.partial"))


def _unavailable(package: Package, folder: Path) -> None:
    raise DataError(f"{package.name}: not available (apt-get: no such package)")


def test_a_second_run_makes_only_what_is_missing(tmp_path: Path, archives: Path) -> None:
    output = tmp_path / "corpus"
    one = make.build_corpus([GUIDE_PACKAGE], output, archives, seed=0, workers=1)
    both = [GUIDE_PACKAGE, BOOK_PACKAGE]
    (old,) = (output / file["name"] for file in one.packages["guide"]["files"])
    before = old.stat().st_mtime_ns
    (output / "books").mkdir()
    (output / "books" / "cut.jsonl.zst.partial").write_text("from a run that was stopped")
    two = make.build_corpus(both, output, archives, seed=0, workers=1)
    assert old.stat().st_mtime_ns == before and set(two.packages) == {"guide", "@some/book"}
    assert not (output / "books" / "cut.jsonl.zst.partial").exists()
    # A damaged file and another version are made anew, to the same and to other content.
    content = old.read_bytes()
    old.write_bytes(content[:-1])
    make.build_corpus(both, output, archives, seed=0, workers=1)
    assert old.read_bytes() == content
    deb(archives / "guide_2.1_all.deb", dict(list(MANUAL.items())[:3]))
    three = make.build_corpus(both, output, archives, seed=0, workers=1)
    assert three.packages["guide"]["archive"] == "guide_2.1_all.deb"
    assert old.read_bytes() != content


def test_nothing_available_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_download", _unavailable)
    with pytest.raises(DataError, match="none of the packages is available; run apt-get update"):
        make.build_corpus([GUIDE_PACKAGE], tmp_path / "c", tmp_path / "p", seed=0, workers=1)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'E: Unable to locate package guide' >&2; exit 100", r"\(apt-get: E: Unable to loc"),
        ("exit 3", r"\(apt-get: exit code 3\)"),
        ("exit 0", "guide: apt fetched nothing"),
        (None, "apt-get is not installed"),
    ],
)
def test_a_client_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, message: str
) -> None:
    if script is not None:
        (tmp_path / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/nowhere")
    with pytest.raises(DataError, match=message):
        download.fetch(GUIDE_PACKAGE, tmp_path / "packages")


def test_a_download_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "npm").write_text("#!/bin/sh\nprintf x > some-book-1.2.0.tgz\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = download.fetch(BOOK_PACKAGE, tmp_path / "packages")
    assert found == tmp_path / "packages" / "some-book-1.2.0.tgz" and found.read_text() == "x"
    (tmp_path / "npm").unlink()
    assert download.fetch(BOOK_PACKAGE, tmp_path / "packages") == found


@pytest.mark.parametrize("cut", [4, 200, -300])
def test_a_damaged_archive_is_named(tmp_path: Path, cut: int) -> None:
    path = deb(tmp_path / "guide_2.0_all.deb", MANUAL)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"guide_2\.0_all\.deb: .*; delete it to fetch it again"):
        list(read_members(path, lambda name, size: True))


def test_an_archive_cut_off_anywhere_is_noticed(tmp_path: Path) -> None:
    paths = [deb(tmp_path / "guide_2.0_all.deb", MANUAL), tmp_path / "some-book-1.0.0.tgz"]
    paths[1].write_bytes(tar(BOOK, "gz"))
    for path in paths:
        whole = path.read_bytes()
        files = len(list(read_members(path, lambda name, size: True)))
        for cut in range(0, len(whole), 7):
            path.write_bytes(whole[:cut])
            try:
                assert len(list(read_members(path, lambda name, size: True))) == files
            except DataError as error:
                assert "delete it to fetch it again" in str(error)


def test_a_size_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = deb(tmp_path / "guide_2.0_all.deb", MANUAL)
    path.write_bytes(path.read_bytes()[:56] + b"?" + path.read_bytes()[57:])
    with pytest.raises(DataError, match=r"guide_2\.0_all\.deb: cannot be read"):
        list(read_members(path, lambda name, size: True))


@pytest.mark.parametrize("content", [b"{", b'{"a": "\\ud800"}'])
def test_a_damaged_file_of_a_package_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some-book-1.0.0.tgz"
    path.write_bytes(tar(BOOK | {"package/europe/aa.json": content}, "gz"))
    with pytest.raises(DataError, match=r"some-book-1\.0\.0\.tgz: holds a file that cannot"):
        build_package(BOOK_PACKAGE, path, tmp_path / "corpus", 0, lambda done: None)
    assert not list(tmp_path.glob("corpus/*/*"))


def _killed(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_one_line(
    tmp_path: Path, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "_build_counted", _killed)
    with pytest.raises(DataError, match=r"a process was killed, .* fewer --workers"):
        make.build_corpus([GUIDE_PACKAGE], tmp_path / "corpus", archives, seed=0, workers=1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400)), max_size=30))
def test_documents_hold_every_page_within_the_limits(pages: list[tuple[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SHORTEST_BYTES", 10)
        patch.setattr(documents, "LONG_BYTES", 100)
        patch.setattr(documents, "LONGEST_BYTES", 300)
        made = [Page(group, f"{i:03d}" + "é" * n) for i, (group, n) in enumerate(pages)]
        found = list(join_pages(made))
    assert all(10 <= document.text_bytes <= 300 for document in found)
    assert all(document.text_bytes == len(document.text.encode()) for document in found)
    joined, total = "".join(d.text for d in found), "".join(p.text for p in made)
    # Only a last remainder under the shortest length, or a cut character, may be missing.
    missing = len(total) - len(joined.replace("\n", ""))
    assert 0 <= missing <= 10 * len(made)


def test_the_split_is_by_content_and_seed() -> None:
    where = [place(f"text {i}", 0, 0.1, 4) for i in range(4000)]
    assert where == [place(f"text {i}", 0, 0.1, 4) for i in range(4000)]
    assert where != [place(f"text {i}", 1, 0.1, 4) for i in range(4000)]
    assert 300 < where.count(None) < 500
    assert all(800 < where.count(shard) < 1000 for shard in range(4))


HTML = """<html><head><title>no</title></head><body><nav><a>up</a><p>open</nav>
<h1>Caf&eacute;</h1><p>two
  words<script>var x</script></p><pre>a   b
  c</pre><ul><li>one<li>two</ul><footer>no</footer></nav></pre> end</body>"""


def test_html_keeps_what_a_reader_reads() -> None:
    lines = [line.strip() for line in html_to_text(HTML).split("\n") if line.strip()]
    assert lines == ["Café", "two words", "a   b", "c", "one", "two", "end"]
    assert "\n  c" in html_to_text(HTML)


@pytest.mark.parametrize("begin", ["<body>", "<h1>", "<div><p>"])
def test_a_head_may_have_no_end(begin: str) -> None:
    page = f"<html><head><title>no</title><meta charset=utf-8><style>a {{}}</style>{begin}text"
    assert html_to_text(page).split() == ["text"]


@pytest.mark.parametrize(
    ("part", "path", "wanted"),
    [
        ("code", "linux/kernel/fork.c", True),
        ("code", "linux/drivers/net/Kconfig", True),
        ("code", "linux/drivers/gpu/include/asic_reg/a.h", False),
        ("code", "linux/logo.ppm", False),
        ("docs", "usr/share/doc/guide/en/intro.html", True),
        ("docs", "usr/share/doc/guide/intro.txt.gz", True),
        ("docs", "usr/share/doc/guide/de/intro.html", False),
        ("docs", "usr/share/doc/guide/pt_BR/intro.html", False),
        ("docs", "usr/share/doc/guide/intro.fr.html", False),
        ("docs", "usr/share/doc/guide/genindex.html", False),
        ("books", "package/data/1790.txt", True),
        ("books", "package/package.json", False),
    ],
)
def test_which_files_are_text(part: str, path: str, wanted: bool) -> None:
    assert READERS[part].wanted(path, 5_000) == wanted


def test_navigation_is_left_out_of_manuals() -> None:
    bar = "Previous | Next | Contents | Index | About this manual"
    menu = "\n".join(["Home", "Menu", "About", "Documentation", "Download", "Licence", "Support"])
    members = [
        Member(f"g/{i}.txt", f"{bar}\n{prose(i, 400)}\n\n{menu}\n\n{i}".encode()) for i in range(3)
    ]
    text = "".join(page.text for page in READERS["docs"].pages(members))
    assert text.count(bar) == text.count(menu) == 1
    assert all(f"of page {i}." in text for i in range(3))


def test_a_book_beside_its_chapters_is_read_once() -> None:
    chapters = [Member(f"package/data/chapter_{i}.txt", prose(i).encode()) for i in range(2)]
    book = Member("package/data/data.txt", "\n".join(map(prose, range(2))).encode())
    pages = READERS["books"].pages([*chapters, book])
    assert [page.text for page in pages] == [book.content.decode()]


def test_the_packages_are_named_once() -> None:
    names = [package.name for package in PACKAGES]
    assert len(set(names)) == len(names)
    assert {package.part for package in PACKAGES} == set(PARTS)


def test_wrong_flags_end_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path), "--parts", "code,novels"])
    assert caught.value.code == 2
    assert "--parts 'novels': must be of code, docs, books" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path), "--workers", "0"])
    assert caught.value.code == 2
    assert "--workers 0: must be positive" in capsys.readouterr().err
    command = [sys.executable, "-m", "experiments.corpus", "--typo"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode == 2
