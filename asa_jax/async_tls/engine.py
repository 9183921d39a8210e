"""The offload engine of one layer: all blocks on the host, those in use in a pool on the device.

One step of decoding, in this order:

    append(tokens)      the new token goes to the tail's slot; a full tail starts for the host
    commit()            blocks that the last step asked for, and that landed, take slots
    fetch(blocks)       only if the blocks are needed now: asks, waits and commits
    slots_of, pool      attention reads
    prefetch(blocks)    asks for the missing blocks of the next step

Slots change in `append`, `commit` and `fetch` only, so attention reads what it was told of. The
first block, the tail and the one before it never lose their slots, nor do the blocks asked for
last. A block that is on its way has no slot: it is missed, not read.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from asa_jax.async_tls.settings import NUM_ALWAYS_KEPT, AsyncTLSConfig
from asa_jax.async_tls.slot_table import SlotTable, State
from asa_jax.async_tls.transfers import Backend, TransferError


@dataclasses.dataclass
class Counters:
    """What an engine did; blocks unless the name says else."""

    hits: int = 0
    misses: int = 0
    # beyond max_transfers, to be asked for again
    overflow: int = 0
    # not landed when they were to be used, and left out
    late: int = 0
    # landed when nobody needed them any more
    unused: int = 0
    # transfers that a step had to wait for
    stalled_transfers: int = 0
    to_device_bytes: int = 0
    to_host_bytes: int = 0


class Move(NamedTuple):
    """Blocks [n] of rows [n] on their way, and the generations of the rows when they left."""

    transfer: Any
    rows: np.ndarray
    blocks: np.ndarray
    generations: np.ndarray


def slots_for(cfg: AsyncTLSConfig) -> int:
    """Slots of a row: twice what a step reads, so that what the last steps read stays."""
    return 2 * (cfg.num_blocks + NUM_ALWAYS_KEPT)


class Engine:
    """Blocks of `num_sequences * num_kv_heads` rows; sequences may have different lengths.

    Attributes:
        counters: of all that was moved, found and missed.
        lengths: int64 [B], tokens of each sequence.
    """

    def __init__(
        self,
        cfg: AsyncTLSConfig,
        num_sequences: int,
        num_kv_heads: int,
        num_blocks: int,
        backend: Backend,
        *,
        late: Literal["wait", "skip"] = "wait",
        max_transfers: int | None = None,
    ) -> None:
        """Starts with empty sequences.

        Args:
            cfg: sizes of blocks and of the selection.
            num_sequences: B.
            num_kv_heads: K.
            num_blocks: of a row in host memory, C.
            backend: for B * K rows of C blocks, with at least `slots_for(cfg)` slots.
            late: whether a step waits for blocks that have not landed or does without them.
            max_transfers: most blocks that a row asks for in a step; None for no limit. What is
                beyond is counted and asked for at the next step if it is still selected.

        Raises:
            ValueError: the pool is too small.
        """
        if backend.num_slots < slots_for(cfg):
            raise ValueError(f"backend: {backend.num_slots} slots, needs {slots_for(cfg)}")
        self.counters = Counters()
        self.lengths = np.zeros(num_sequences, np.int64)
        num_rows = num_sequences * num_kv_heads
        self._table = SlotTable(num_rows, num_blocks, backend.num_slots)
        self._backend, self._block_size, self._late = backend, cfg.block_size, late
        self._heads, self._max_transfers = num_kv_heads, max_transfers
        self._num_blocks = cfg.num_blocks
        self._needed = np.zeros((num_rows, num_blocks), bool)
        self._generations = np.zeros(num_rows, np.int64)
        self._fetches: list[Move] = []
        self._flushes: list[Move] = []

    @property
    def pool(self) -> Any:
        """The blocks on the device, [B * K, slots, block_size, width]."""
        return self._backend.pool

    def slots_of(self, blocks: np.ndarray) -> np.ndarray:
        """The slots of blocks [B, K, L], int32; -1 for those that cannot be read now, or are -1."""
        by_row = blocks.reshape(len(self._table.state), -1)
        first = self._table.slot_of.shape[1] * np.arange(len(by_row))[:, None]
        slots = self._table.slot_of.take(first + by_row, mode="clip")
        return np.where(by_row >= 0, slots, np.int32(-1)).reshape(blocks.shape)

    def load(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Takes over the prompts of all sequences, whatever these held before.

        Args:
            tokens: [B, K, S, width], S a multiple of the block size.
            lengths: int [B], tokens of each sequence, at least 1.

        Raises:
            TransferError: the blocks that are always kept cannot be brought to the device; all
                sequences are empty then.
            ValueError: a sequence has no token, or more than are given.
        """
        if np.min(lengths) < 1:
            raise ValueError(f"lengths: {np.min(lengths)}, expected at least 1 token a sequence")
        if np.max(lengths) > tokens.shape[2]:
            raise ValueError(f"lengths: {np.max(lengths)}, but tokens holds {tokens.shape[2]}")
        self.reset(np.arange(len(self.lengths)))
        self.lengths[:] = lengths
        rows = np.arange(len(self._table.state))
        by_row = tokens.reshape(len(rows), -1, self._block_size, tokens.shape[-1])
        self._backend.store_prompt(rows, by_row)
        tails = self._tails()
        numbers = np.arange(self._table.state.shape[1])
        self._table.state[numbers < tails[:, None]] = State.HOST
        # A tail that is full is sealed; one that is not only passes through the host.
        self._table.state[rows, tails] = State.HOST
        try:
            self._request(*np.nonzero(self._always_kept(rows[:, None], numbers)))
            self._finish_fetches(wait=True)
        except TransferError:
            self.reset(np.arange(len(self.lengths)))
            raise
        open_rows = rows[self._row_lengths() % self._block_size > 0]
        self._table.state[open_rows, tails[open_rows]] = State.TAIL

    def append(self, tokens: Any) -> None:
        """Appends one token [B, K, width] to every sequence.

        Raises:
            TransferError: no slot is free, and what is on its way to the host does not arrive;
                nothing was appended.
            ValueError: a sequence is full.
        """
        most = self._table.state.shape[1] * self._block_size
        if (self.lengths >= most).any():
            raise ValueError(f"tokens: a sequence holds {most} tokens already, all it has room for")
        rows, offsets = np.arange(len(self._table.state)), self._row_lengths() % self._block_size
        self.lengths += 1
        tails, opened = self._tails(), rows[offsets == 0]
        try:
            self._take(opened, tails[opened], State.TAIL)
        except TransferError:
            self.lengths -= 1
            raise
        slots = self._table.slot_of[rows, tails]
        flat = tokens.reshape(len(rows), -1)
        self._backend.write_tokens(rows, slots, offsets, flat)
        full = rows[offsets == self._block_size - 1]
        self._table.state[full, tails[full]] = State.SEALING
        self._start_flushes()

    def prefetch(self, blocks: np.ndarray) -> None:
        """Asks for the blocks [B, K, L] of the next step, the first ones first, -1 for none.

        Raises:
            ValueError: there are more than cfg.num_blocks for a row.
        """
        blocks = blocks.reshape(len(self._table.state), -1)
        listed = blocks >= 0
        if (most := np.count_nonzero(listed, axis=1).max()) > self._num_blocks:
            raise ValueError(f"blocks: {most} a row, the pool is for {self._num_blocks}")
        rows = np.broadcast_to(np.arange(len(blocks))[:, None], blocks.shape)
        places = rows * self._table.state.shape[1] + blocks
        state = self._table.state.take(places, mode="clip")
        there = listed & (state != State.EMPTY)
        self._needed[:] = False
        self._needed.reshape(-1)[places[there]] = True
        self._table.touch(rows[there], blocks[there])
        missing = listed & (state == State.HOST)
        absent = np.count_nonzero(missing) + np.count_nonzero(listed & (state == State.LOADING))
        self.counters.misses += int(absent)
        self.counters.hits += int(np.count_nonzero(there) - absent)
        if self._max_transfers is not None:
            asked = missing & (missing.cumsum(1) <= self._max_transfers)
            self.counters.overflow += int(missing.sum() - asked.sum())
            missing = asked
        self._request(rows[missing], blocks[missing])

    def commit(self) -> None:
        """Gives slots to the blocks that landed; the others are waited for or left out, by `late`.

        Raises:
            TransferError: a transfer failed or did not land in time. Its blocks can be asked for
                again, or start for the host again, and all others are in order.
        """
        error = self._finish_flushes(wait=False)
        self._start_flushes()
        self._finish_fetches(wait=self._late == "wait")
        if error:
            raise error

    def fetch(self, blocks: np.ndarray) -> None:
        """Brings the blocks [B, K, L] to the device now, however many they are.

        Raises:
            TransferError: as for `commit`.
        """
        limit, self._max_transfers = self._max_transfers, None
        try:
            self.prefetch(blocks)
        finally:
            self._max_transfers = limit
        self._finish_fetches(wait=True)

    def reset(self, sequences: np.ndarray) -> None:
        """Ends sequences; what is on its way for them lands nowhere."""
        rows = (sequences[:, None] * self._heads + np.arange(self._heads)).reshape(-1)
        self._table.clear(rows)
        self._needed[rows] = False
        self._generations[rows] += 1
        self.lengths[sequences] = 0
        # Nobody is to wait for what is for ended sequences alone, nor to hear of its failure.
        self._fetches = [move for move in self._fetches if self._same(move).any()]
        self._flushes = [move for move in self._flushes if self._same(move).any()]

    def _row_lengths(self) -> np.ndarray:
        return np.repeat(self.lengths, self._heads)

    def _tails(self) -> np.ndarray:
        return np.maximum(self._row_lengths() - 1, 0) // self._block_size

    def _always_kept(self, rows: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Which blocks of rows are the first, the tail or the one before it."""
        tails = self._tails()[rows]
        kept = (blocks == 0) | ((blocks >= tails - 1) & (blocks <= tails))
        return kept & (self._row_lengths()[rows] > 0)

    def _wanted(self, rows: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Which blocks of rows were asked for last, or are always kept; of -1, anything."""
        places = rows * self._needed.shape[1] + blocks
        return self._needed.take(places, mode="clip") | self._always_kept(rows, blocks)

    def _take(self, rows: np.ndarray, blocks: np.ndarray, state: np.int8) -> np.ndarray:
        """Slots for blocks; where none can be given up, those that are being sealed are awaited."""
        slots = self._table.take(rows, blocks, state, self._wanted)
        if slots is None:
            self._start_flushes()
            error = self._finish_flushes(wait=True)
            if error:
                raise error
            slots = self._table.take(rows, blocks, state, self._wanted)
            # Needed and always kept blocks are half of the slots at most, the others RESIDENT now.
            assert slots is not None
        return slots

    def _request(self, rows: np.ndarray, blocks: np.ndarray) -> None:
        if rows.size:
            self._table.state[rows, blocks] = State.LOADING
            transfer = self._backend.start_fetch(rows, blocks)
            self._fetches.append(Move(transfer, rows, blocks, self._generations[rows]))
            self.counters.to_device_bytes += rows.size * self._backend.block_bytes

    def _start_flushes(self) -> None:
        """Starts sealed blocks for the host that are not on their way."""
        waiting = self._table.state == State.SEALING
        if not waiting.any():
            return
        for move in self._flushes:
            alive = self._same(move)
            waiting[move.rows[alive], move.blocks[alive]] = False
        rows, blocks = np.nonzero(waiting)
        if rows.size:
            slots = self._table.slot_of[rows, blocks]
            transfer = self._backend.start_flush(rows, slots)
            self._flushes.append(Move(transfer, rows, blocks, self._generations[rows]))
            self.counters.to_host_bytes += rows.size * self._backend.block_bytes

    def _finish_flushes(self, *, wait: bool) -> TransferError | None:
        """Stores blocks that landed on the host; those of a failed transfer stay to be sealed."""
        landed, self._flushes, error = self._landed(self._flushes, wait=wait)
        for move in landed:
            which = self._alive(move, State.SEALING)
            rows, blocks = move.rows[which], move.blocks[which]
            self._backend.store(move.transfer, which, rows, blocks)
            self._table.state[rows, blocks] = State.RESIDENT
        return error[0][1] if error else None

    def _finish_fetches(self, *, wait: bool) -> None:
        landed, self._fetches, failed = self._landed(self._fetches, wait=wait)
        for move in [move for move, _ in failed] + landed:
            which = self._alive(move, State.LOADING)
            self._table.state[move.rows[which], move.blocks[which]] = State.HOST
        for move in landed:
            self._place(move)
        self.counters.late += sum(len(self._alive(move, State.LOADING)) for move in self._fetches)
        if failed:
            raise failed[0][1]

    def _place(self, move: Move) -> None:
        """Gives slots to the landed blocks that are still needed."""
        which = self._alive(move, State.HOST)
        wanted = self._wanted(move.rows[which], move.blocks[which])
        self.counters.unused += int((~wanted).sum())
        which = which[wanted]
        rows, blocks = move.rows[which], move.blocks[which]
        slots = self._take(rows, blocks, State.RESIDENT)
        self._backend.place(move.transfer, which, rows, slots)

    def _same(self, move: Move) -> np.ndarray:
        """Which of a move's blocks [n] are of sequences that have not ended since they left."""
        return self._generations[move.rows] == move.generations

    def _alive(self, move: Move, state: np.int8) -> np.ndarray:
        """Numbers of a move's blocks that are in a state and of the sequence that they left."""
        return np.flatnonzero(
            self._same(move) & (self._table.state[move.rows, move.blocks] == state)
        )

    def _landed(
        self, moves: list[Move], *, wait: bool
    ) -> tuple[list[Move], list[Move], list[tuple[Move, TransferError]]]:
        """Divides moves into those that landed, those on their way and those that failed."""
        landed, under_way, failed = [], [], []
        for move in moves:
            try:
                if self._backend.landed(move.transfer):
                    landed.append(move)
                elif wait:
                    self.counters.stalled_transfers += 1
                    self._backend.wait(move.transfer)
                    landed.append(move)
                else:
                    under_way.append(move)
            except TransferError as error:
                failed.append((move, error))
        return landed, under_way, failed
