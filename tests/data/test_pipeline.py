"""Packed batches: what a row holds, and that the stream is the same however it is divided."""

import collections
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asa_jax.data.fingerprint import fingerprint
from asa_jax.data.pipeline import (
    Batch,
    Pieces,
    TrainIterator,
    validation_batches,
)
from asa_jax.data.shards import TokenFolder
from asa_jax.errors import ConfigError, DataError

END = 256
Piece = tuple[tuple[int, ...], tuple[int, ...]]  # inputs, targets
SETTINGS = {"weights": [1.0], "sequence_length": 32, "batch_size": 4, "alignment": 4, "seed": 7}


def expected_pieces(texts: Iterable[str], sequence_length: int) -> collections.Counter[Piece]:
    """The definition: inputs are a document's tokens, targets the next ones, the end included."""
    pieces: collections.Counter[Piece] = collections.Counter()
    for text in texts:
        tokens = [*text.encode(), END]
        for start in range(0, len(tokens) - 1, sequence_length):
            stop = min(start + sequence_length, len(tokens) - 1)
            pieces[tuple(tokens[start:stop]), tuple(tokens[start + 1 : stop + 1])] += 1
    return pieces


def pieces_of(batches: Iterable[Batch], alignment: int) -> Iterator[Piece]:
    """Takes rows apart again and checks their layout on the way."""
    for batch in batches:
        chex.assert_equal_shape(list(batch.values()))
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
        for row in range(len(batch["inputs"])):
            yield from _pieces_of_row(
                {name: array[row] for name, array in batch.items()}, alignment
            )


def _pieces_of_row(row: dict[str, np.ndarray], alignment: int) -> Iterator[Piece]:
    segments = row["segment_ids"]
    for name in ("inputs", "targets", "positions"):
        assert not row[name][segments == 0].any()
    last_end = 0
    for segment in range(1, segments.max() + 1):
        (where,) = np.nonzero(segments == segment)
        start, length = where[0], len(where)
        np.testing.assert_array_equal(where, np.arange(start, start + length))
        assert start % alignment == 0 and 0 <= start - last_end < alignment
        np.testing.assert_array_equal(row["positions"][where], np.arange(length))
        yield tuple(row["inputs"][where].tolist()), tuple(row["targets"][where].tolist())
        last_end = start + length


def take(iterator: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(iterator, count))


def texts(count: int, longest: int, seed: int = 0) -> list[str]:
    """Documents of random printable text."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, count)
    return [bytes(rng.integers(33, 127, length).tolist()).decode() for length in lengths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_folder) -> TokenFolder:
    """Many documents in several shards."""
    path = tmp_path_factory.mktemp("folder")
    return write_folder(path, texts(300, 90), texts(40, 90, seed=1), "--shard-tokens", "4000")


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(
        st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1, max_size=60),
        min_size=1,
        max_size=25,
    ),
    blocks=st.integers(1, 6),
    alignment=st.integers(1, 9),
    batch_size=st.integers(1, 5),
    shard_tokens=st.sampled_from([30, 10_000]),
)
def test_one_pass_holds_every_token_once_in_aligned_segments(
    write_folder,
    documents: list[str],
    blocks: int,
    alignment: int,
    batch_size: int,
    shard_tokens: int,
) -> None:
    length = blocks * alignment
    with tempfile.TemporaryDirectory() as path:
        folder = write_folder(Path(path), ["x"], documents, "--shard-tokens", str(shard_tokens))
        batches = list(
            validation_batches(
                [folder], sequence_length=length, batch_size=batch_size, alignment=alignment
            )
        )
    for batch in batches:
        chex.assert_shape(batch["inputs"], (batch_size, length))
    found = collections.Counter(pieces_of(batches, alignment))
    assert found == expected_pieces(documents, length)


def test_an_epoch_of_training_holds_every_token_once(folder: TokenFolder) -> None:
    expected = expected_pieces(texts(300, 90), 32)
    stream = pieces_of(TrainIterator([folder], **SETTINGS), alignment=4)
    # Rows of two epochs may mix, by at most the rows that are packed together.
    found = collections.Counter(itertools.islice(stream, 3 * expected.total()))
    assert set(found) == set(expected)
    assert all(1 <= found[piece] / expected[piece] <= 5 for piece in expected)
    assert sum(found[piece] == 3 * expected[piece] for piece in expected) > 0.7 * len(expected)


def test_every_epoch_and_seed_has_its_own_order(folder: TokenFolder) -> None:
    count = len(Pieces(folder.split("train"), 32))
    stream = list(itertools.islice(pieces_of(TrainIterator([folder], **SETTINGS), 4), 2 * count))
    neighbours = set(itertools.pairwise(stream[:count]))
    repeated = neighbours & set(itertools.pairwise(stream[count:]))
    assert len(repeated) < 0.1 * len(neighbours)
    again = itertools.islice(pieces_of(TrainIterator([folder], **SETTINGS), 4), count)
    assert list(again) == stream[:count]
    other = pieces_of(TrainIterator([folder], **SETTINGS | {"seed": 8}), 4)
    assert len(neighbours & set(itertools.pairwise(itertools.islice(other, count)))) < 0.1 * count


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_divide_the_batches_of_one(folder: TokenFolder, processes: int) -> None:
    whole = take(TrainIterator([folder], **SETTINGS), 12)
    parts = [
        take(TrainIterator([folder], **SETTINGS, process_index=i, process_count=processes), 12)
        for i in range(processes)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    chex.assert_trees_all_equal(joined, whole)


def test_validation_is_divided_alike_and_the_last_batch_is_padded(folder: TokenFolder) -> None:
    options = {"sequence_length": 32, "batch_size": 16, "alignment": 4}
    whole = list(validation_batches([folder], **options))
    assert not whole[-1]["segment_ids"][-1].any() and whole[-1]["segment_ids"][0].any()
    halves = [
        list(validation_batches([folder], **options, process_index=i, process_count=2))
        for i in range(2)
    ]
    assert len(halves[0]) == len(halves[1]) == len(whole)
    np.testing.assert_array_equal(halves[1][-1]["inputs"], whole[-1]["inputs"][8:])


def test_validation_takes_every_source_in_turn(tmp_path: Path, write_folder) -> None:
    """So the first batches, all that an evaluation may read, are of all of them."""
    folders = [
        write_folder(tmp_path / name, ["x"], [name * 5] * documents)
        for name, documents in (("a", 3), ("b", 1), ("c", 2))
    ]
    batches = validation_batches(folders, sequence_length=8, batch_size=2, alignment=8)
    inputs = [bytes(inputs).decode() for inputs, _ in pieces_of(batches, 8)]
    assert [text[0] for text in inputs] == ["a", "b", "c", "a", "c", "a"]


@pytest.mark.parametrize("steps", [0, 1, 7, 30, 55])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (2, 1)])
def test_a_restored_state_goes_on_exactly(
    folder: TokenFolder, steps: int, before: int, after: int
) -> None:
    straight = take(TrainIterator([folder], **SETTINGS), steps + 20)[steps:]
    states = []
    for index in range(before):
        saved = TrainIterator([folder], **SETTINGS, process_index=index, process_count=before)
        take(saved, steps)
        states.append(json.dumps(saved.get_state()))
        saved.close()
    assert len(set(states)) == 1  # any process's state will do
    resumed = []
    for index in range(after):
        iterator = TrainIterator([folder], **SETTINGS, process_index=index, process_count=after)
        take(iterator, 3)  # where it was does not matter
        iterator.set_state(json.loads(states[0]))
        resumed.append(take(iterator, 20))
    for step, expected in enumerate(straight):
        parts = [batches[step]["inputs"] for batches in resumed]
        np.testing.assert_array_equal(np.concatenate(parts), expected["inputs"])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.8)])
def test_weights_are_shares_of_tokens(
    tmp_path: Path, write_folder, weights: tuple[float, float]
) -> None:
    # One source of short and one of long documents, told apart by their letters.
    folders = [
        write_folder(tmp_path / "short", ["a" * (5 + i % 10) for i in range(100)]),
        write_folder(tmp_path / "long", ["b" * (80 + i % 20) for i in range(50)]),
    ]
    mixed = TrainIterator(folders, **SETTINGS | {"weights": weights, "sequence_length": 128})
    inputs = np.concatenate([batch["inputs"] for batch in take(mixed, 100)])
    share = (inputs == ord("a")).sum() / (inputs != 0).sum()
    assert abs(share - weights[0] / sum(weights)) < 0.02


def test_damage_found_while_training_is_named(tmp_path: Path, write_folder) -> None:
    folder = write_folder(tmp_path, texts(50, 90))
    iterator = TrainIterator([folder], **SETTINGS)
    take(iterator, 1)
    path = folder.path / "train-00000.bin"
    with open(path, "r+b") as file:
        file.truncate(8)
    with pytest.raises(DataError, match=r"train-00000\.bin: expected \d+ bytes, found 8"):
        take(iterator, 100)


def test_the_batch_must_divide_over_the_processes(folder: TokenFolder) -> None:
    with pytest.raises(
        ConfigError, match=r"config\.data\.batch_size = 4: must be a multiple of .* 3"
    ):
        TrainIterator([folder], **SETTINGS, process_index=0, process_count=3)


def test_the_fingerprint_is_of_content_and_settings(tmp_path: Path, write_folder) -> None:
    here = write_folder(tmp_path / "here", ["one", "two"])
    there = write_folder(tmp_path / "there", ["one", "two"])
    other = write_folder(tmp_path / "other", ["one", "too"])
    before = fingerprint([here], **SETTINGS)
    assert json.loads(json.dumps(before)) == before == fingerprint([there], **SETTINGS)

    def changed(folders: Sequence[TokenFolder], **changes: object) -> list[str]:
        now = fingerprint(folders, **SETTINGS | changes)
        return [name for name in before if now[name] != before[name]]

    assert changed([other]) == ["sources"]
    for name, value in [("seed", 8), ("batch_size", 8), ("sequence_length", 64), ("alignment", 8)]:
        assert changed([here], **{name: value}) == [name]
    assert changed([here, here], weights=[1.0, 1.0]) == ["sources", "tokenizers", "weights"]
