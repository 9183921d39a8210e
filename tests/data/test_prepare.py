"""Text to token shards, end to end: formats, splits, interruption, bad input."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from asa_jax.data import rounds
from asa_jax.data.prepare import main, parse, prepare
from asa_jax.data.shards import TokenFolder, open_token_folder
from asa_jax.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["Café.", "你好, world", "three\nlines\nhere", "  ", "🎉" * 5]


def run(output: Path, *inputs: str | Path, **options: object) -> str:
    """Runs prepare with the byte tokenizer and no validation unless `options` say otherwise."""
    settings = {"tokenizer": "bytes", "validation_fraction": 0, "output": output} | options
    arguments = ["--input", *map(str, inputs)]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        arguments += [flag] if value is True else [flag, str(value)]
    return prepare(parse(arguments))


def documents(folder: TokenFolder, split: str = "train") -> list[str]:
    """Reads every document of a split back."""
    tokenizer = folder.tokenizer()
    texts = []
    for shard in folder.split(split):
        for start, end in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
            ids = shard.read(int(start), int(end - start))
            assert ids[-1] == folder.end_of_document_id
            texts.append(tokenizer.decode(ids.tolist()))
    return texts


def jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    lines = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))
    content = lines.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def parquet(path: Path, texts: list[str | None]) -> Path:
    pa.parquet.write_table(pa.table({"text": texts, "n": range(len(texts))}), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "text files"])
@pytest.mark.parametrize("tokenizer", ["bytes", ROOT / "texts" / "tokenizer.json"])
def test_every_format_comes_back_from_the_shards(
    tmp_path: Path, name: str, tokenizer: str | Path
) -> None:
    if name == "text files":
        for i, text in enumerate(DOCUMENTS):
            (tmp_path / f"{i}.txt").write_bytes(text.encode())
        source = tmp_path / "*.txt"
    else:
        source = (parquet if name.endswith("parquet") else jsonl)(tmp_path / name, DOCUMENTS)
    said = run(tmp_path / "out", source, tokenizer=tokenizer)
    folder = open_token_folder(tmp_path / "out")
    expected = [text for text in DOCUMENTS if text.strip()]
    assert documents(folder) == expected
    assert folder.total("train", "text_bytes") == sum(len(text.encode()) for text in expected)
    assert "in 4 documents" in said and "1 empty documents skipped" in said


def test_one_round_or_many_hold_the_same_tokens(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [f"document {i} " * i for i in range(40)])
    run(tmp_path / "one", source)
    run(tmp_path / "many", source, shard_tokens=500)
    one, many = open_token_folder(tmp_path / "one"), open_token_folder(tmp_path / "many")
    assert len(one.shards) == 1 and len(many.shards) > 5
    assert documents(one) == documents(many)


def test_the_split_follows_the_content(tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(400)]
    run(tmp_path / "a", jsonl(tmp_path / "a.jsonl", texts), validation_fraction=0.25)
    backwards = jsonl(tmp_path / "b.jsonl", texts[::-1] + texts[:50])
    run(tmp_path / "b", backwards, validation_fraction=0.25)
    first, second = open_token_folder(tmp_path / "a"), open_token_folder(tmp_path / "b")
    held_out = set(documents(first, "validation"))
    assert held_out == set(documents(second, "validation"))
    assert not held_out & set(documents(first)) | held_out & set(documents(second))
    assert 70 < len(held_out) < 130


def test_validation_files_are_kept_out_of_training(tmp_path: Path) -> None:
    for name in ("a", "b", "held"):
        (tmp_path / f"{name}.txt").write_text(name)
    run(tmp_path / "out", tmp_path / "*.txt", validation_input=tmp_path / "held.txt")
    folder = open_token_folder(tmp_path / "out")
    assert documents(folder, "validation") == ["held"]
    assert documents(folder) == ["a", "b"]


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path) -> None:
    content = json.loads((ROOT / "texts" / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 4096, "content": "<far>"})
    vocabulary = content["model"]["vocab"]
    vocabulary["zz far"] = 70_000
    (tmp_path / "t.json").write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("some text")
    run(tmp_path / "out", tmp_path / "a.txt", tokenizer=tmp_path / "t.json")
    folder = open_token_folder(tmp_path / "out")
    assert (folder.dtype, folder.vocab_size) == (np.dtype("<u4"), 70_001)
    assert documents(folder) == ["some text"]


def test_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    run(tmp_path / "out", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*")}
    assert "nothing to do" in run(tmp_path / "out", source)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*")}
    assert {p: t for p, t in before.items() if p.name != ".lock"} == {
        p: t for p, t in after.items() if p.name != ".lock"
    }


def test_another_request_is_refused_unless_told(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    run(tmp_path / "out", source)
    with pytest.raises(DataError, match=r"\(validation_fraction, shard_tokens changed\).*--over"):
        run(tmp_path / "out", source, validation_fraction=0.5, shard_tokens=9)
    jsonl(source, ["new text"])
    with pytest.raises(DataError, match=r"\(files changed\)"):
        run(tmp_path / "out", source)
    run(tmp_path / "out", source, overwrite=True)
    assert documents(open_token_folder(tmp_path / "out")) == ["new text"]


def test_a_damaged_folder_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    run(tmp_path / "out", source)
    shard = tmp_path / "out" / "train-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    run(tmp_path / "out", source)
    assert shard.read_bytes() == whole
    assert f"expected {len(whole)} bytes, found {len(whole) - 1}" in capsys.readouterr().err


# Runs prepare in a process that kills itself at the n-th call of a function.
KILLED = """
import os, signal, sys
from asa_jax.data import prepare, rounds, shard_writer
where, when = sys.argv[1], int(sys.argv[2])
owner, name = {"append": (shard_writer.ShardWriter, "append"), "replace": (os, "replace")}[where]
called, original = 0, getattr(owner, name)
def patched(*arguments):
    global called
    called += 1
    if called == when:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(owner, name, patched)
rounds.BATCH_CHARACTERS = 300
prepare.main(sys.argv[3:])
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("where", "when"),
    [
        ("append", 1),
        ("append", 23),
        ("replace", 1),
        ("replace", 3),
        ("replace", 8),
        ("replace", 12),
    ],
)
def test_a_killed_run_goes_on_to_the_same_folder(tmp_path: Path, where: str, when: int) -> None:
    sources = [
        jsonl(tmp_path / "a.jsonl", ["", *(f"a{i} " * 20 for i in range(40))]),
        jsonl(tmp_path / "b.jsonl.gz", [f"b{i} " * 20 for i in range(40)]),
    ]
    options = {"shard_tokens": 700, "validation_fraction": 0.2}
    run(tmp_path / "straight", *sources, **options)
    arguments = ["--input", *map(str, sources), "--tokenizer", "bytes", "--shard-tokens", "700"]
    arguments += ["--validation-fraction", "0.2", "--output", str(tmp_path / "killed")]
    command = [sys.executable, "-c", KILLED, where, str(when), *arguments]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -9
    assert not (tmp_path / "killed" / "manifest.json").exists()
    # Shards that the progress file lists are kept, not written again.
    progress = tmp_path / "killed" / "progress.json"
    state = json.loads(progress.read_text())["state"] if progress.exists() else {"shards": []}
    finished = [tmp_path / "killed" / f"{shard['name']}.bin" for shard in state["shards"]]
    assert finished or (where, when) in [("append", 1), ("replace", 1), ("replace", 3)]
    written = {path: path.stat().st_ino for path in finished}
    run(tmp_path / "killed", *sources, **options)
    assert {path: path.stat().st_ino for path in finished} == written
    assert content(tmp_path / "killed") == content(tmp_path / "straight")


def test_a_finished_shard_that_changed_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(100)])
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "BATCH_CHARACTERS", 100)
        _fail_at_document(patch, 60)
        with pytest.raises(RuntimeError):
            run(tmp_path / "out", source, shard_tokens=200)
    shard = tmp_path / "out" / "train-00000.bin"
    flipped = bytearray(shard.read_bytes())
    flipped[10] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(DataError, match=r"train-00000\.bin: changed since it was written"):
        run(tmp_path / "out", source, shard_tokens=200)


def _fail_at_document(patch: pytest.MonkeyPatch, number: int) -> None:
    append, count = rounds.ShardWriter.append, iter(range(number))

    def failing(*arguments: object) -> None:
        if next(count, None) is None:
            raise RuntimeError
        append(*arguments)

    patch.setattr(rounds.ShardWriter, "append", failing)


FULL_DISK = """
import resource, sys
from asa_jax.data import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
prepare.main(sys.argv[1:])
"""


def test_a_full_disk_leaves_whole_files_and_goes_on_later(tmp_path: Path) -> None:
    small = [f"{i} " * 100 for i in range(10)]
    source = jsonl(tmp_path / "a.jsonl", [*small, "x" * 30_000, *small])
    arguments = ["--input", str(source), "--tokenizer", "bytes", "--shard-tokens", "1000"]
    arguments += ["--validation-fraction", "0", "--output", str(tmp_path / "out")]
    command = [sys.executable, "-c", FULL_DISK, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert f"{tmp_path / 'out'}: cannot be written (File too large)" in last
    assert "Traceback" not in result.stderr
    names = set(content(tmp_path / "out"))
    assert "train-00001.bin" in names and not any(name.endswith(".partial") for name in names)
    main(arguments)
    assert documents(open_token_folder(tmp_path / "out")) == [*small, "x" * 30_000, *small]


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    (tmp_path / "out").mkdir()
    hold = "import fcntl,sys,time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); time.sleep(60)"
    lock = str(tmp_path / "out" / ".lock")
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="another process is writing to it"):
            run(tmp_path / "out", source)
        holder.kill()
    run(tmp_path / "out", source)


# Without the time of day, which would give the test another name in each process.
CUT_OFF = gzip.compress(b'{"text": "a"}\n', mtime=0)[:-6]
BAD_FILES = [
    ("a.txt", b"fine until \xff here", r"a\.txt: invalid UTF-8 at byte 11 \(0xff\)"),
    ("a.txt", "cut é".encode()[:-1], r"a\.txt: invalid UTF-8 at byte 4 \(0xc3\)"),
    ("a.txt", b"", "no training text: 1 files, 1 empty documents"),
    ("a.txt", b" \n\t", "no training text: 1 files, 1 empty documents"),
    ("a.jsonl", b"", "no training text: 1 files, 0 empty documents"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', r"a\.jsonl:2: broken JSON \(.* column 12 "),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: broken JSON \(maximum recursion"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl:2: invalid UTF-8 at byte 24 "),
    ("a.jsonl", b'{"id": 1, "body": "x"}\n', r"a\.jsonl:1: no field 'text' \(it has id, body\)"),
    ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: field 'text' is int, not text"),
    ("a.jsonl", b'\n["text"]\n', r"a\.jsonl:2: expected a JSON object, found list"),
    ("a.jsonl", b'{"text": "a\\ud800b"}\n', r"a\.jsonl:1: .* half a surrogate pair at character 1"),
    ("a.jsonl.gz", CUT_OFF, r"a\.jsonl\.gz: cannot be read"),
    ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: cannot be read \(Not a gzipped file"),
    ("a.parquet", b"PAR1 no", r"a\.parquet: cannot be read"),
    ("a.docx", b"x", r"a\.docx: unknown kind of file, expected \.txt, \.jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_input_is_named_by_file_and_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        run(tmp_path / "out", tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list(tmp_path.glob("out/*.partial"))


def test_parquet_columns_and_rows_are_named(tmp_path: Path) -> None:
    table = parquet(tmp_path / "a.parquet", ["x", None, "y"])
    run(tmp_path / "out", table)
    assert documents(open_token_folder(tmp_path / "out")) == ["x", "y"]
    with pytest.raises(DataError, match=r"no field 'body' \(it has text, n\); name .*--text-field"):
        run(tmp_path / "other", table, text_field="body")
    with pytest.raises(DataError, match=r"a\.parquet row 1: field 'n' is int, not text"):
        run(tmp_path / "third", table, text_field="n")


def test_bad_options_are_named(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    with pytest.raises(DataError, match=r"nowhere/\*\.txt: no such file"):
        run(tmp_path / "out", tmp_path / "nowhere" / "*.txt")
    with pytest.raises(DataError, match=f"{tmp_path}: is a folder"):
        run(tmp_path / "out", tmp_path)
    with pytest.raises(ConfigError, match=r"--validation-fraction 1\.5: must be in \[0, 1\)"):
        run(tmp_path / "out", source, validation_fraction=1.5)
    with pytest.raises(ConfigError, match="--shard-tokens 0: must be positive"):
        run(tmp_path / "out", source, shard_tokens=0)
    with pytest.raises(ConfigError, match="--workers -1: must be positive"):
        run(tmp_path / "out", source, workers=-1)


def test_the_command_prints_one_line_and_exits_with_a_code(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    command = [sys.executable, "-m", "asa_jax.data.prepare", "--tokenizer", "bytes"]
    command += ["--output", str(tmp_path / "out"), "--input", str(tmp_path / "a.txt")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and "invalid UTF-8 at byte 0" in result.stderr
    result = subprocess.run([*command, "--typo"], cwd=ROOT, capture_output=True, timeout=60)
    assert result.returncode == 2


def test_the_shards_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [f"document {i}, é " * (i % 7 * 40) for i in range(200)])
    tokenizer = str(ROOT / "texts" / "tokenizer.json")
    command = [sys.executable, "-m", "asa_jax.data.prepare", "--tokenizer", tokenizer]
    command += ["--input", str(source), "--validation-fraction", "0.2"]
    folders = [tmp_path / "1", tmp_path / "3"]
    for folder in folders:
        options = ["--workers", folder.name, "--output", str(folder)]
        subprocess.run([*command, *options], cwd=ROOT, check=True, timeout=60)
    assert content(folders[0]) == content(folders[1])
