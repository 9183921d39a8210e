"""The offload engine over the simulated back end: tables, contents, failures."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from asa_jax.async_tls import host_memory
from asa_jax.async_tls.engine import Engine, slots_for
from asa_jax.async_tls.host_memory import HostMemoryError, allocate_host, system_available_bytes
from asa_jax.async_tls.settings import AsyncTLSConfig
from asa_jax.async_tls.simulated import FAILS, PATIENCE_TICKS, SimulatedBackend
from asa_jax.async_tls.slot_table import State
from asa_jax.async_tls.transfers import TransferError

SEQUENCES, HEADS, BLOCKS, BLOCK, WIDTH = 2, 2, 14, 3, 2
ROWS, LENGTH = SEQUENCES * HEADS, BLOCKS * BLOCK
CFG = AsyncTLSConfig(
    block_size=BLOCK, num_blocks=3, token_budget=4, num_channels=2, drift_cosine=-1.0
)
HELD = (State.TAIL, State.SEALING, State.RESIDENT)


class Setup:
    """An engine, its back end and the tokens that it must give back."""

    def __init__(self, *, ticks=(), slots=None, **options):
        self.ticks = list(ticks)  # of the transfers to come; none left: at once
        self.backend = SimulatedBackend(
            ROWS, BLOCKS, slots or slots_for(CFG), BLOCK, WIDTH, np.float32,
            ticks_of=lambda: self.ticks.pop(0) if self.ticks else 0,
        )  # fmt: skip
        self.engine = Engine(CFG, SEQUENCES, HEADS, BLOCKS, self.backend, **options)
        self.tokens = np.zeros((SEQUENCES, LENGTH, HEADS, WIDTH), np.float32)
        self.rng = np.random.default_rng(0)

    def load(self, *lengths):
        self.tokens[:] = self.rng.normal(size=self.tokens.shape)
        self.engine.load(self.tokens.swapaxes(1, 2), np.array(lengths))

    def append(self):
        token = self.rng.normal(size=(SEQUENCES, HEADS, WIDTH)).astype(np.float32)
        at = np.arange(SEQUENCES), self.engine.lengths.copy()
        self.engine.append(token)
        self.tokens[at] = token

    def blocks(self, *blocks):
        """The same blocks for every row."""
        return np.broadcast_to(np.array(blocks, np.int32), (SEQUENCES, HEADS, len(blocks)))

    def readable(self, *blocks):
        return (self.slots_of(*blocks) >= 0).all()

    def slots_of(self, *blocks):
        return self.engine.slots_of(self.blocks(*blocks))

    def check(self):
        """Tables agree with each other and with the lengths; what can be read is what was given."""
        table, lengths = self.engine._table, np.repeat(self.engine.lengths, HEADS)
        held = np.isin(table.state, HELD)
        np.testing.assert_array_equal(held, table.slot_of >= 0)
        rows, blocks = np.nonzero(held)
        np.testing.assert_array_equal(table.block_of[rows, table.slot_of[rows, blocks]], blocks)
        assert (table.block_of >= 0).sum() == held.sum()

        numbers = np.arange(BLOCKS)
        np.testing.assert_array_equal(
            table.state == State.EMPTY, numbers * BLOCK >= lengths[:, None]
        )
        is_open = (numbers == (lengths // BLOCK)[:, None]) & (lengths % BLOCK > 0)[:, None]
        np.testing.assert_array_equal(table.state == State.TAIL, is_open)
        assert held[self.engine._always_kept(np.arange(ROWS)[:, None], numbers)].all()

        by_row = self.tokens.swapaxes(1, 2).reshape(ROWS, BLOCKS, BLOCK, WIDTH)
        there = np.arange(LENGTH).reshape(BLOCKS, BLOCK) < lengths[:, None, None]
        read = self.backend.pool[rows, table.slot_of[rows, blocks]]
        given = there[rows, blocks]
        np.testing.assert_array_equal(read[given], by_row[rows, blocks][given])
        stored = np.isin(table.state, (State.RESIDENT, State.HOST, State.LOADING))
        np.testing.assert_array_equal(self.backend.host[stored], by_row[stored])


class RandomSteps(stateful.RuleBasedStateMachine):
    """Any calls in any order, with transfers that come late or never."""

    @stateful.initialize(
        late=st.sampled_from(["wait", "skip"]), max_transfers=st.sampled_from([None, 1])
    )
    def begin(self, late, max_transfers):
        self.setup = Setup(late=late, max_transfers=max_transfers)
        self.limited = max_transfers is not None or late == "skip"
        self.setup.load(5, LENGTH - 7)
        self.asked = np.zeros((ROWS, BLOCKS), bool)

    @stateful.rule(ticks=st.lists(st.sampled_from([0, 1, 3, FAILS, 10**6]), max_size=3))
    def faults(self, ticks):
        self.setup.ticks = ticks

    @stateful.rule(seed=st.integers(0, 999))
    def load(self, seed):
        lengths = np.random.default_rng(seed).integers(1, LENGTH, SEQUENCES)
        if self.fails(lambda: self.setup.load(*lengths)):
            assert not self.setup.engine.lengths.any()
        self.asked[:] = False

    @stateful.rule(sequence=st.integers(0, SEQUENCES - 1))
    def reset(self, sequence):
        self.setup.engine.reset(np.array([sequence]))
        self.asked.reshape(SEQUENCES, -1)[sequence] = False

    @stateful.rule(count=st.integers(1, 4))
    def append(self, count):
        for _ in range(count):
            if self.setup.engine.lengths.max() < LENGTH:
                before = self.setup.engine.lengths.copy()
                with self.keeps_what_was_asked_for():
                    if self.fails(self.setup.append):
                        np.testing.assert_array_equal(self.setup.engine.lengths, before)

    @stateful.rule(seed=st.integers(0, 999))
    def prefetch(self, seed):
        self.setup.engine.prefetch(self.choose(seed))

    @stateful.rule()
    def commit(self):
        with self.keeps_what_was_asked_for():
            failed = self.fails(self.setup.engine.commit)
        if not failed and not self.limited:
            assert (self.setup.engine._table.state[self.asked] != State.LOADING).all()

    @stateful.rule(seed=st.integers(0, 999))
    def fetch(self, seed):
        blocks = self.choose(seed)
        with self.keeps_what_was_asked_for():
            failed = self.fails(lambda: self.setup.engine.fetch(blocks))
        if not failed:
            assert (self.setup.engine._table.slot_of[self.asked] >= 0).all()

    @stateful.invariant()
    def tables_and_contents_are_in_order(self):
        if hasattr(self, "setup"):
            self.setup.check()

    def choose(self, seed):
        """Blocks of each row that there are, and remembers them as asked for."""
        rng, lengths = np.random.default_rng(seed), np.repeat(self.setup.engine.lengths, HEADS)
        blocks = np.stack([rng.permutation(BLOCKS)[: CFG.num_blocks] for _ in range(ROWS)])
        blocks = np.where(blocks * BLOCK < lengths[:, None], blocks, -1).astype(np.int32)
        self.asked[:] = False
        rows, place = np.nonzero(blocks >= 0)
        self.asked[rows, blocks[rows, place]] = True
        return blocks.reshape(SEQUENCES, HEADS, -1)

    def fails(self, call):
        """Whether a call reports a transfer, which only those that were told to may make it do."""
        try:
            call()
        except TransferError as error:
            assert "\n" not in str(error)
            return True
        return False

    def keeps_what_was_asked_for(self):
        return _Keeps(self)


class _Keeps:
    """No block that was asked for last loses its slot inside."""

    def __init__(self, machine):
        self.machine = machine

    def __enter__(self):
        held = self.machine.setup.engine._table.slot_of >= 0
        self.before = held & self.machine.asked

    def __exit__(self, *error):
        still = self.machine.setup.engine._table.slot_of >= 0
        assert (still | ~self.before).all()


TestRandomSteps = RandomSteps.TestCase
TestRandomSteps.settings = hypothesis.settings(
    max_examples=50, stateful_step_count=60, deadline=None
)


def test_only_missing_blocks_travel_and_every_byte_is_counted():
    setup = Setup()
    setup.load(LENGTH - 1, LENGTH - 1)
    block_bytes, counters = BLOCK * WIDTH * 4, setup.engine.counters
    always = 3 * ROWS
    assert counters.to_device_bytes == always * block_bytes
    setup.engine.fetch(setup.blocks(2, 3, 4))
    setup.engine.fetch(setup.blocks(4, 5, 2))
    assert counters.to_device_bytes == (always + 4 * ROWS) * block_bytes
    assert (counters.hits, counters.misses) == (2 * ROWS, 4 * ROWS)
    setup.append()  # fills the tail
    assert counters.to_host_bytes == ROWS * block_bytes


def test_the_block_that_was_not_used_for_longest_goes_first():
    setup = Setup()
    setup.load(LENGTH, LENGTH)  # 12 slots: 3 always kept, 9 for others
    for blocks in ((1, 2, 3), (4, 5, 6), (7, 8, 9), (1, 2, 3), (10, 11, -1)):
        setup.engine.fetch(setup.blocks(*blocks))
        setup.check()
    assert setup.readable(0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13)
    gone = (setup.slots_of(4, 5, 6) < 0).sum(-1)
    np.testing.assert_array_equal(gone, 2)


def test_a_row_asks_for_no_more_than_its_limit_best_first():
    setup = Setup(max_transfers=2)
    setup.load(LENGTH, LENGTH)
    setup.engine.prefetch(setup.blocks(5, 3, 8))
    setup.engine.commit()
    assert setup.readable(5, 3) and not setup.readable(8)
    assert setup.engine.counters.overflow == ROWS
    setup.engine.prefetch(setup.blocks(5, 3, 8))
    setup.engine.commit()
    assert setup.readable(8)
    setup.engine.fetch(setup.blocks(4, 6, 7))  # what is needed now has no limit
    assert setup.readable(4, 6, 7)


def test_a_late_transfer_is_waited_for():
    setup = Setup()
    setup.load(LENGTH, LENGTH)
    setup.ticks = [7]
    setup.engine.prefetch(setup.blocks(2, 3, 4))
    assert not setup.readable(2)
    setup.engine.commit()
    assert setup.readable(2, 3, 4)
    assert setup.engine.counters.stalled_transfers == 1


def test_a_late_transfer_is_left_out_until_it_lands():
    setup = Setup(late="skip")
    setup.load(LENGTH, LENGTH)
    setup.ticks = [2]
    setup.engine.prefetch(setup.blocks(2, 3, 4))
    for landed in (False, False, True):
        setup.engine.commit()
        assert setup.readable(2) == setup.readable(3, 4) == landed
        setup.check()
    assert setup.engine.counters.late == 2 * 3 * ROWS
    assert setup.engine.counters.stalled_transfers == 0


def test_what_nobody_needs_any_more_takes_no_slot():
    setup = Setup(late="skip")
    setup.load(LENGTH, LENGTH)
    setup.ticks = [1]
    setup.engine.prefetch(setup.blocks(2, 3, 4))
    setup.engine.commit()
    setup.engine.prefetch(setup.blocks(4, 5, 6))
    setup.engine.commit()
    assert setup.readable(4, 5, 6) and not setup.readable(2) and not setup.readable(3)
    assert setup.engine.counters.unused == 2 * ROWS


@pytest.mark.parametrize(
    ("ticks", "message"),
    [(FAILS, "12 blocks failed"), (10**6, f"12 blocks did not land in {PATIENCE_TICKS} ticks")],
)
def test_a_transfer_that_never_lands_is_reported_and_can_be_asked_for_again(ticks, message):
    setup = Setup()
    setup.load(LENGTH, LENGTH)
    setup.ticks = [ticks]
    setup.engine.prefetch(setup.blocks(2, 3, 4))
    with pytest.raises(TransferError, match=message):
        setup.engine.commit()
    setup.check()
    assert not setup.readable(2)
    setup.engine.fetch(setup.blocks(2, 3, 4))
    assert setup.readable(2, 3, 4)


def test_a_block_that_does_not_reach_the_host_keeps_its_slot_and_starts_again():
    setup = Setup()
    setup.load(4 * BLOCK - 1, 4 * BLOCK - 1)
    setup.ticks = [FAILS]
    setup.append()
    with pytest.raises(TransferError, match="4 blocks failed"):
        setup.engine.commit()
    setup.check()
    assert (setup.engine._table.state[:, 3] == State.SEALING).all()
    setup.engine.commit()
    assert (setup.engine._table.state[:, 3] == State.RESIDENT).all()
    setup.check()


@pytest.mark.parametrize("ticks", [[0, FAILS], [FAILS] * 12, [10**6] * 12])
def test_slots_that_run_short_wait_for_blocks_on_their_way_to_the_host(ticks):
    """A block that does not reach it is not given up, and no token is lost."""
    setup = Setup()
    setup.load(BLOCK - 1, BLOCK - 1)
    setup.ticks = ticks.copy()  # of blocks 0, 1, ...
    with pytest.raises(TransferError, match="4 blocks"):
        for _ in range(LENGTH):
            setup.append()
    np.testing.assert_array_equal(setup.engine.lengths, slots_for(CFG) * BLOCK)
    assert (setup.engine._table.state[:, 1] == State.SEALING).all()
    setup.check()
    setup.ticks = []
    while setup.engine.lengths[0] < LENGTH:
        setup.append()
        setup.check()
    setup.engine.commit()
    setup.check()


def test_blocks_asked_for_stay_however_many_tokens_come():
    setup = Setup()
    setup.load(4 * BLOCK, 4 * BLOCK)
    setup.engine.fetch(setup.blocks(1, 2, -1))
    for _ in range(LENGTH - 4 * BLOCK):
        setup.append()
        setup.engine.commit()
    assert setup.readable(1, 2)


def test_a_new_sequence_does_not_wait_for_the_blocks_of_the_old_one():
    setup = Setup(late="skip")
    setup.load(BLOCK - 1, BLOCK - 1)
    setup.ticks = [50]
    setup.append()
    before = setup.engine.counters.to_host_bytes
    setup.ticks = [0, 0]
    setup.load(BLOCK - 1, BLOCK - 1)
    setup.append()
    assert setup.engine.counters.to_host_bytes == 2 * before
    setup.engine.commit()
    assert (setup.engine._table.state[:, 0] == State.RESIDENT).all()


def test_what_lands_after_its_sequence_ended_changes_nothing():
    setup = Setup(late="skip")
    setup.load(LENGTH - 1, LENGTH - 1)
    setup.ticks = [1, 1]
    setup.append()  # the last block starts for the host
    setup.engine.prefetch(setup.blocks(2, 3, 4))
    setup.load(LENGTH, LENGTH)
    setup.engine.prefetch(setup.blocks(2, 3, 4))
    for _ in range(3):
        setup.engine.commit()
        setup.check()
    assert setup.readable(2, 3, 4)


def test_failures_of_an_ended_sequence_are_nobodys():
    setup = Setup()
    setup.load(LENGTH - 1, LENGTH - 1)
    setup.ticks = [FAILS, 10**6]
    setup.append()
    setup.engine.prefetch(setup.blocks(2, 3, 4))
    setup.load(LENGTH, LENGTH)
    setup.engine.commit()
    setup.check()
    assert setup.engine.counters.stalled_transfers == 0


def test_a_full_sequence_and_a_small_pool_are_named():
    setup = Setup()
    setup.load(3, LENGTH)
    with pytest.raises(ValueError, match=f"holds {LENGTH} tokens already"):
        setup.append()
    with pytest.raises(ValueError, match="lengths: 0, expected at least 1"):
        setup.load(3, 0)
    with pytest.raises(ValueError, match=f"lengths: {LENGTH + 1}, but tokens holds {LENGTH}"):
        setup.load(3, LENGTH + 1)
    with pytest.raises(ValueError, match="blocks: 4 a row, the pool is for 3"):
        setup.engine.prefetch(setup.blocks(1, 2, 3, 4))
    with pytest.raises(ValueError, match="backend: 11 slots, needs 12"):
        Setup(slots=11)


def test_a_cache_that_the_host_has_no_room_for_is_refused_with_its_bytes(monkeypatch):
    assert 2**20 < system_available_bytes() < 2**50
    with pytest.raises(HostMemoryError, match=f"need {2**60} bytes"):
        allocate_host((2**60,), np.uint8)
    monkeypatch.setattr(host_memory, "system_available_bytes", lambda: 2**61)
    with pytest.raises(HostMemoryError, match=f"need {2**60} bytes"):
        allocate_host((2**60,), np.uint8)  # the system itself refuses
    monkeypatch.setattr(host_memory, "system_available_bytes", lambda: 100)
    needed = ROWS * BLOCKS * BLOCK * WIDTH * 4
    with pytest.raises(HostMemoryError, match=f"need {needed} bytes of host memory and 100 are"):
        SimulatedBackend(ROWS, BLOCKS, 12, BLOCK, WIDTH, np.float32)


def test_an_empty_engine_has_moved_nothing():
    assert dataclasses.asdict(Setup().engine.counters)["to_device_bytes"] == 0


def test_files_that_the_system_keeps_in_memory_count_as_free(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("10000\n")
    (tmp_path / "memory.current").write_text("9000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\nactive_file 3000\ninactive_file 4000\n")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert system_available_bytes() == 8000
