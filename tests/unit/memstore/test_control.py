"""The control block: a whole table is there at any moment, and nonsense in it is noticed."""

from __future__ import annotations

import os

import numpy as np
import pytest

from memstore.control import STATE_BYTES, ControlBlock, Progress, block_bytes
from memstore.errors import Corrupt


@pytest.fixture
def block() -> ControlBlock:
    return ControlBlock.make(7, 3)


def test_what_is_published_is_read_by_the_other_end(block: ControlBlock) -> None:
    other = ControlBlock.map(block.region.descriptor, 3)
    assert (other.lease, other.is_held) == (7, True)
    table = np.arange(1, 13).reshape(3, 4)
    other.publish(table)
    assert (block.table() == table).all()
    assert block.progress(1) == Progress(epoch=5, next_position=6, floor=6, num_appended=8), "no floor beyond the end"
    block.end()
    assert not other.is_held
    other.close()
    block.close()


@pytest.mark.parametrize("num_written", range(14))
def test_whoever_dies_while_publishing_leaves_a_whole_table(block: ControlBlock, num_written: int) -> None:
    old, new = np.ones((3, 4), np.int64), np.full((3, 4), 2)
    block.publish(old)
    turn = int(block._header[4]) + 1
    block._copies[turn & 1].reshape(-1)[: min(num_written, 12)] = 2  # the writes of `publish`, one by one
    if num_written > 12:
        block._header[4] = turn
    assert (block.table() == (new if num_written > 12 else old)).all()


def test_a_reader_that_was_overtaken_reads_again(block: ControlBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Overtaking:
        """Two tables are published when the fence is passed for the first time."""

        num_passed = 0

        def __enter__(self) -> None:
            self.num_passed += 1
            if self.num_passed == 1:
                for value in (5, 6):
                    turn = int(block._header[4]) + 1
                    block._copies[turn & 1] = value
                    block._header[4] = turn

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("memstore.control._fence", Overtaking())
    assert block.progress(0).epoch == 6


def test_a_holder_that_never_stops_does_not_hold_up_a_reader(
    block: ControlBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "_is_still", lambda turn: False)
    for read in (block.table, lambda: block.progress(0)):
        with pytest.raises(Corrupt):
            read()


@pytest.mark.parametrize(
    "row", [(-1, 0, 0, 0), (1, -1, 0, 0), (1, 1 << 60, 0, 0), (1, 0, -1, 0), (1, 0, 0, -1), (1, 0, 0, 1 << 60)]
)
def test_counters_that_cannot_be_are_noticed(block: ControlBlock, row: tuple[int, ...]) -> None:
    block.publish(np.array([row] * 3))
    with pytest.raises(Corrupt):
        block.progress(2)


def test_a_state_stays_in_its_cell(block: ControlBlock) -> None:
    assert not block.put_state(0, bytes(STATE_BYTES))
    for index in range(3):
        assert block.put_state(index, bytes([index]) * (STATE_BYTES - 8 - index))
    assert [block.state(index) for index in range(3)] == [bytes([n]) * (STATE_BYTES - 8 - n) for n in range(3)]
    block._states[1, :8] = 255
    with pytest.raises(Corrupt):
        block.state(1)


def test_what_is_not_a_block_is_refused(block: ControlBlock) -> None:
    with pytest.raises(OSError, match="size"):
        ControlBlock.map(block.region.descriptor, 4)
    block._header[0] = 0
    with pytest.raises(Corrupt):
        ControlBlock.map(block.region.descriptor, 3)
    assert block_bytes(3) == os.fstat(block.region.descriptor).st_size
