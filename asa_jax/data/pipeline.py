"""Token folders to packed batches, through grain.

Documents are cut into pieces of at most `sequence_length` input tokens, pieces are shuffled and
mixed, and packed into rows so that each starts at a multiple of `alignment`. One piece of input
tokens x[i : i + n] has the targets x[i + 1 : i + n + 1]: the end of a document is predicted and
never read. Targets in the prompt of a document are not learnt. The order of rows is settled before
they are divided over processes, so a run can go on with another number of them; every process
therefore packs the whole global batch and keeps its rows.

A batch is a dict of int32 arrays [B, T] (B rows of this process):
    inputs            token ids, 0 in padding
    targets           token ids, NOT_LEARNT for those of a prompt, 0 in padding
    segment_ids       1, 2, ... per piece of a row, 0 in padding
    positions         0, 1, ... within a piece, 0 in padding
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from asa_jax.data.shards import OpenShard, TokenFolder
from asa_jax.errors import ConfigError

Batch = dict[str, np.ndarray]
NOT_LEARNT = -1

# Rows packed at a time: more waste less padding, but are read again on resume and held in memory.
_PACKED_ROWS = 32
_PACKED_TOKENS = 2**21
_PREFETCHED_BATCHES = 2


class Pieces:
    """The pieces of one split of a folder, by index."""

    def __init__(self, shards: Sequence[OpenShard], sequence_length: int) -> None:
        self._shards = shards
        indices = [_cut(shard.offsets, shard.text_starts, sequence_length) for shard in shards]
        counts = [len(starts) for starts, *_ in indices]
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        self._start, self.lengths, self._prompt = map(np.concatenate, zip(*indices, strict=True))

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The inputs and targets of a piece, int32 [n, 2]."""
        start, length = int(self._start[index]), int(self.lengths[index])
        tokens = self._shards[self._shard[index]].read(start, length + 1)
        pairs = np.stack([tokens[:-1], tokens[1:]], axis=1)
        pairs[: self._prompt[index], 1] = NOT_LEARNT
        return {"tokens": pairs}


def _cut(
    offsets: np.ndarray, text_starts: np.ndarray, sequence_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents into pieces.

    Args:
        offsets: int64 [documents + 1].
        text_starts: int64 [documents].
        sequence_length: most input tokens a piece.

    Returns:
        int64 starts, int32 lengths (input tokens) and int32 numbers of first targets that are of
        the prompt, of the pieces in order.
    """
    inputs = np.diff(offsets) - 1  # the last token is a target alone
    pieces = -(-inputs // sequence_length)
    first = np.cumsum(pieces) - pieces
    skip = (np.arange(pieces.sum()) - np.repeat(first, pieces)) * sequence_length
    starts = np.repeat(offsets[:-1], pieces) + skip
    lengths = np.minimum(np.repeat(inputs, pieces) - skip, sequence_length)
    prompts = np.clip(np.repeat(text_starts, pieces) - (starts + 1), 0, lengths)
    return starts, lengths.astype(np.int32), prompts.astype(np.int32)


def _rows(
    pieces: grain.MapDataset, *, sequence_length: int, alignment: int, seed: int | None
) -> grain.IterDataset:
    """Packs pieces into rows {'tokens': [T, 2], 'tokens_segment_ids': [T], ...}."""
    # No read-ahead threads: reading a mapped piece is quicker than handing it over.
    unthreaded = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return grain.experimental.FirstFitPackIterDataset(
        pieces.to_iter_dataset(unthreaded),
        length_struct={"tokens": sequence_length},
        pack_alignment_struct={"tokens": alignment},
        num_packing_bins=min(_PACKED_ROWS, max(1, _PACKED_TOKENS // sequence_length)),
        shuffle_bins=seed is not None,
        seed=seed or 0,
    )


class _Stack:
    """Turns the rows of a global batch into the batch of one process."""

    def __init__(self, batch_size: int, process_index: int, process_count: int) -> None:
        if batch_size % process_count:
            raise ConfigError(
                f"config.data.batch_size = {batch_size}: must be a multiple of the "
                f"{process_count} processes"
            )
        per_process = batch_size // process_count
        self._batch_size = batch_size
        self._rows = slice(process_index * per_process, (process_index + 1) * per_process)

    def __call__(self, rows: Sequence[dict[str, np.ndarray]]) -> Batch:
        padding = {name: np.zeros_like(value) for name, value in rows[0].items()}
        whole = [*rows, *[padding] * (self._batch_size - len(rows))]
        mine = {name: np.stack([row[name] for row in whole[self._rows]]) for name in padding}
        return {
            "inputs": np.ascontiguousarray(mine["tokens"][..., 0]),
            "targets": np.ascontiguousarray(mine["tokens"][..., 1]),
            "segment_ids": mine["tokens_segment_ids"],
            "positions": mine["tokens_positions"],
        }


class TrainIterator:
    """Endless global batches of the training split, of which this process gets its rows.

    The state is a small JSON-able dict: it holds for any number of processes, and only with the
    same `fingerprint`, which the caller compares.
    """

    def __init__(
        self,
        folders: Sequence[TokenFolder],
        *,
        weights: Sequence[float],
        sequence_length: int,
        batch_size: int,
        alignment: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Opens the shards; batches are read ahead in a thread from the first `next` on.

        Args:
            folders: sources to mix, as `open_token_folder` gives them.
            weights: positive share of each source, in tokens, in any unit.
            sequence_length: T, tokens a row.
            batch_size: rows of the global batch, a multiple of `process_count`.
            alignment: pieces start at multiples of it.
            seed: of the order of pieces and rows.
            process_index: which rows to give, 0 .. process_count - 1.
            process_count: processes that divide the rows of the global batch.

        Raises:
            DataError: a shard is not as its manifest says.
            ConfigError: the batch does not divide over the processes.
        """
        sources = [Pieces(folder.split("train"), sequence_length) for folder in folders]
        rows = _rows(
            _mix(sources, weights, seed),
            sequence_length=sequence_length,
            alignment=alignment,
            seed=seed,
        )
        batches = rows.batch(
            batch_size,
            drop_remainder=True,
            batch_fn=_Stack(batch_size, process_index, process_count),
        )
        self._iterator = iter(
            grain.experimental.ThreadPrefetchIterDataset(
                batches, prefetch_buffer_size=_PREFETCHED_BATCHES
            )
        )

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Where the stream is: restored, the next batch is the one that would come next."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called."""
        self._iterator.set_state(state)

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        self._iterator.close()


def _mix(sources: Sequence[Pieces], weights: Sequence[float], seed: int) -> grain.MapDataset:
    # grain mixes by pieces, the weights are of tokens: a source of short pieces gives more of them.
    shares = [w / source.lengths.mean() for w, source in zip(weights, sources, strict=True)]
    seeds = np.random.SeedSequence(seed).generate_state(len(sources))
    datasets = [
        grain.MapDataset.source(source).seed(int(source_seed)).shuffle().repeat()
        for source, source_seed in zip(sources, seeds, strict=True)
    ]
    return grain.MapDataset.mix(datasets, shares)


def validation_batches(
    folders: Sequence[TokenFolder],
    *,
    sequence_length: int,
    batch_size: int,
    alignment: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass over the validation split, in order; rows that fill the last batch are all padding.

    Args:
        folders: sources; each gives a row in turn, as long as it has some.
        sequence_length: T, tokens a row.
        batch_size: rows of the global batch, a multiple of `process_count`.
        alignment: pieces start at multiples of it.
        process_index: which rows to give, 0 .. process_count - 1.
        process_count: processes that divide the rows of the global batch.

    Returns:
        As many batches for every process.

    Raises:
        DataError: a shard is not as its manifest says, or there is no validation text.
        ConfigError: the batch does not divide over the processes.
    """
    sources = [Pieces(folder.split("validation"), sequence_length) for folder in folders]
    packed = [
        _rows(
            grain.MapDataset.source(source),
            sequence_length=sequence_length,
            alignment=alignment,
            seed=None,
        )
        for source in sources
    ]
    stack = _Stack(batch_size, process_index, process_count)
    return map(stack, itertools.batched(_in_turn(packed), batch_size))


def _in_turn(datasets: Sequence[grain.IterDataset]) -> Iterator[dict[str, np.ndarray]]:
    """An element of each in turn; of those that have more where others have ended."""
    left = [iter(dataset) for dataset in datasets]
    while left:
        for iterator in list(left):
            try:
                yield next(iterator)
            except StopIteration:
                left.remove(iterator)
