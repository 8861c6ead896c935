"""What comes back after a stop: everything, byte for byte; or as much as was promised; or Corrupt."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import pytest
import torch

from memstore.errors import EpochChanged, NotReady, ReadOnly
from memstore.sequence import REPLAY_WINDOW
from memstore.types import Durability, MemorySpec, Metric, PayloadSpec, StepResult
from tests.fakes import Diligent, FakeAppendFile, FakeDisk
from tests.lives import FOLDER, SPEC, Life, batch, found

if TYPE_CHECKING:
    from pathlib import Path

INTERVAL = replace(SPEC, durability=Durability.INTERVAL)
WIDE = replace(
    SPEC,
    num_layers=2,
    max_sequences=4,
    dtype=torch.bfloat16,
    payloads=(
        PayloadSpec(name="hidden", dtype=torch.int32, shape=(3,)),
        PayloadSpec(name="x", dtype=torch.int8, shape=(1,)),
    ),
)


def _busy(life: Life) -> None:
    """Something of everything: wraps, several writers, restarts, forks, ends, empty appends, unnumbered ones."""
    for seq, rows in enumerate([1, 3, 0, 6, 2]):
        life.append("a", rows, seq)
    life.append("b", 2, 0, writer="")
    life.append("b", 2, 0, writer="v", value=5)
    life.memory.fork("a", "c", None, 0)
    life.append("c", 1, 0)
    life.append("b", 1, 0, start=True)
    life.memory.reset(["b"], release=True)
    life.memory.reset(["c", "never"], release=False)
    life.append("n", 3, 0)


@pytest.fixture(params=list(Metric), ids=lambda metric: metric.value)
def spec(request: pytest.FixtureRequest) -> MemorySpec:
    return replace(WIDE, metric=request.param)


@pytest.mark.parametrize("durability", [Durability.INTERVAL, Durability.ALWAYS])
@pytest.mark.parametrize("ends", ["killed", "closed"])
@pytest.mark.parametrize("has_snapshot", [False, True])
def test_a_restart_gives_back_everything(
    spec: MemorySpec, durability: Durability, ends: str, has_snapshot: bool
) -> None:
    life = Life(FakeDisk(), replace(spec, durability=durability), is_new=True)
    _busy(life)
    if has_snapshot:
        assert life.snapshot()
        life.append("n", 2, 1)
    before, answer = life.picture(), found(life.memory, "a")
    if ends == "closed":
        life.archive.close()
    life.disk.kill()
    again = life.again()
    assert again.picture() == before
    _assert_identical(found(again.memory, "a"), answer)
    assert again.found is not None
    assert again.found.cut_bytes == 0


def _assert_identical(got: StepResult, want: StepResult) -> None:
    assert got.sequences == want.sequences
    assert got.hits is not None
    assert want.hits is not None
    for name in ("row_splits", "positions", "index", "scores"):
        assert torch.equal(getattr(got.hits, name), getattr(want.hits, name))
    for name, array in want.hits.arrays.items():
        assert torch.equal(got.hits.arrays[name], array)


def test_a_restored_memory_goes_on_and_is_restored_again() -> None:
    life = Life(FakeDisk(), is_new=True)
    for round_ in range(5):
        for seq in range(3):
            life.append("a", 1, 3 * round_ + seq)
        if round_ % 2:
            life.snapshot()
        before = life.picture()
        life.disk.kill()
        life = life.again()
        assert life.picture() == before
    assert life.append("a", 1, 15).first_position == 15


def test_the_last_256_replies_survive() -> None:
    life = Life(FakeDisk(), is_new=True)
    answers = [life.append("a", 1, seq) for seq in range(REPLAY_WINDOW + 10)]
    life.snapshot()
    answers += [life.append("a", 1, seq) for seq in range(REPLAY_WINDOW + 10, REPLAY_WINDOW + 20)]
    again = life.again()
    for seq in range(20, REPLAY_WINDOW + 20):
        answer = again.append("a", 1, seq)
        assert answer == answers[seq]._replace(is_replay=True, live_begin=answer.live_begin)
    assert again.memory.counts().appended_rows == REPLAY_WINDOW + 20


def test_a_write_that_fails_changes_nothing_and_the_next_one_succeeds() -> None:
    life = Life(FakeDisk(), is_new=True)
    life.append("a", 2, 0)
    before = life.picture()
    life.disk.is_full = True
    with pytest.raises(ReadOnly, match="No space"):
        life.append("a", 1, 1)
    with pytest.raises(ReadOnly):
        life.memory.reset(["a"], release=False)
    with pytest.raises(ReadOnly):
        life.memory.fork("a", "b", None, 0)
    assert life.picture() == before
    assert found(life.memory, "a").hits is not None
    assert life.archive.journal.is_refusing
    life.disk.is_full = False
    assert life.append("a", 1, 1).first_position == 2
    assert not life.archive.journal.is_refusing
    after = life.picture()
    assert life.again().picture() == after


def test_a_batch_without_changes_is_answered_while_the_disk_is_full() -> None:
    life = Life(FakeDisk(), is_new=True)
    life.append("a", 2, 0)
    life.disk.is_full = True
    asks = replace(batch(SPEC, "b", 1, 0, writer=""), append=False)
    refused, answered = life.memory.step([batch(SPEC, "a", 1, 1), asks])
    assert isinstance(refused, ReadOnly)
    assert isinstance(answered, StepResult)


def test_what_a_killed_process_was_writing_is_cut_and_reported() -> None:
    life = Life(FakeDisk(), is_new=True)
    life.append("a", 2, 0)
    before = life.picture()
    path = FOLDER / "log-00000001"
    whole = len(life.disk.files[path])
    life.append("a", 1, 1)
    longest = life.disk.files[path]
    for size in range(whole + 1, len(longest)):
        life.disk.files = {path: longest[:size]}
        again = life.again()
        assert again.picture() == before
        assert again.found is not None
        assert again.found.cut_bytes == size - whole
        assert len(life.disk.files[path]) == whole


def test_always_is_answered_when_it_is_synced_and_not_before() -> None:
    life = Life(FakeDisk(), is_new=True, syncer=Diligent(waits=True))
    answered: list[object] = []
    life.append("a", 1, 0)
    life.memory.settle(answered.append)
    life.append("a", 1, 1)
    life.memory.settle(answered.append)
    assert answered == []
    num_syncs = life.disk.num_syncs
    life.syncer.sync()
    assert answered == [None, None]
    assert life.disk.num_syncs == num_syncs + 1
    life.memory.settle(answered.append)
    assert answered == [None] * 3


def test_interval_is_answered_at_once_and_asks_for_one_sync() -> None:
    life = Life(FakeDisk(), INTERVAL, is_new=True, syncer=Diligent(waits=True))
    answered: list[object] = []
    for seq in range(3):
        life.append("a", 1, seq)
        life.memory.settle(answered.append)
    assert answered == [None] * 3
    assert len(life.syncer.asking) == 1


def test_a_failed_sync_is_said_and_nothing_is_changed_any_more() -> None:
    life = Life(FakeDisk(), is_new=True, syncer=Diligent(waits=True))
    answered: list[object] = []
    life.append("a", 1, 0)
    life.memory.settle(answered.append)
    life.disk.cannot_sync = True
    life.syncer.sync()
    (problem,) = answered
    assert isinstance(problem, ReadOnly)
    assert "not known" in problem.message
    life.disk.cannot_sync = False
    with pytest.raises(ReadOnly):
        life.append("a", 1, 1)
    assert found(life.memory, "a").sequences[0].as_of == 1


def test_what_was_written_while_a_sync_failed_is_not_acknowledged() -> None:
    life = Life(FakeDisk(), is_new=True, syncer=Diligent(waits=True))
    answered: list[object] = []
    life.append("a", 1, 0)
    life.disk.cannot_sync = True
    life.archive.journal.sync()
    life.memory.settle(answered.append)
    assert isinstance(answered[0], ReadOnly)


def test_a_log_is_not_closed_while_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptor may be another file's by then."""
    life = Life(FakeDisk(), is_new=True)
    begun, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def write(file: FakeAppendFile, parts: object) -> None:
        begun.set()
        go_on.wait()
        done.append("written")

    monkeypatch.setattr(FakeAppendFile, "write", write)
    monkeypatch.setattr(FakeAppendFile, "close", lambda file: done.append("closed"))
    writing = threading.Thread(target=lambda: life.append("a", 1, 0))
    closing = threading.Thread(target=lambda: life.archive.journal.close("the memory is dropped"))
    writing.start()
    begun.wait()
    closing.start()
    closing.join(0.05)
    go_on.set()
    writing.join()
    closing.join()
    assert done == ["written", "closed"]
    with pytest.raises(ReadOnly, match="dropped"):
        life.append("a", 1, 1)


class CountedDisk(FakeDisk):
    """Counts the files that are open to be written. room: how many writes it has room for."""

    def __init__(self) -> None:
        super().__init__()
        self.open_files: set[Path] = set()
        self.room = sys.maxsize

    def create(self, path: Path) -> FakeAppendFile:
        file = super().create(path)
        self.open_files.add(path)
        file.close = lambda: self.open_files.discard(path)  # type: ignore[method-assign]
        return file

    def add(self, path: Path, content: bytes) -> None:
        self.is_full = self.room <= 0
        self.room -= 1
        super().add(path, content)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_log_that_cannot_be_begun_is_not_left_open(is_new: bool) -> None:
    disk = CountedDisk()
    if not is_new:
        life = Life(disk, is_new=True)
        life.append("a", 1, 0)
        life.archive.close()
    for _ in range(2):
        disk.room, disk.is_full = 0, False
        with pytest.raises(OSError, match="No space"):
            Life(disk, is_new=is_new)
        assert not disk.open_files
    disk.room, disk.is_full = sys.maxsize, False
    assert Life(disk, is_new=is_new).append("a", 1, int(not is_new)).first_position == int(not is_new)


def test_a_disk_without_room_for_new_epochs_is_no_damage() -> None:
    disk = CountedDisk()
    life = Life(disk, INTERVAL, is_new=True)
    epoch = life.append("a", 1, 0).epoch
    life.archive.journal.sync()
    disk.open_files.clear()
    disk.power_off()
    for _ in range(2):
        disk.room, disk.is_full = 1, False  # for the head of the log
        with pytest.raises(NotReady, match="No space"):
            life.again()
        assert not disk.open_files
    disk.room, disk.is_full = sys.maxsize, False
    sequence = found(life.again().memory, "a").sequences[0]
    assert sequence.as_of == 1
    assert sequence.epoch != epoch


@pytest.mark.parametrize("seed", range(30))
def test_always_survives_the_loss_of_power(seed: int) -> None:
    life = Life(FakeDisk(Random(seed)), is_new=True, syncer=Diligent(waits=True))
    pictures = [life.picture()]
    for seq in range(6):
        life.append("a", seq, seq)
        pictures.append(life.picture())
        if seq == 3:
            life.archive.journal.sync()
    life.disk.power_off()
    again = life.again()
    assert again.picture() in pictures[4:]


@pytest.mark.parametrize("seed", range(30))
def test_interval_gives_new_epochs_when_the_machine_went_down(seed: int) -> None:
    life = Life(FakeDisk(Random(seed)), INTERVAL, is_new=True, syncer=Diligent(waits=True))
    epoch = life.append("a", 1, 0).epoch
    life.syncer.sync()
    life.append("a", 2, 1)
    life.disk.power_off()
    again = life.again()
    assert again.found is not None
    assert again.found.is_loss_possible
    result = found(again.memory, "a").sequences[0]
    assert result.as_of in (1, 3)
    assert result.epoch not in (0, epoch)
    with pytest.raises(EpochChanged):
        again.step(batch(INTERVAL, "a", 1, 2, epoch=epoch))
    assert again.append("a", 1, 0).first_position == result.as_of
    before = again.picture()
    again.disk.kill()
    assert again.again().picture() == before  # the new epochs are in the log


def test_interval_keeps_its_epochs_when_the_process_was_killed_or_stopped_in_order() -> None:
    life = Life(FakeDisk(), INTERVAL, is_new=True, syncer=Diligent(waits=True))
    epoch = life.append("a", 1, 0).epoch
    life.disk.kill()
    life = life.again()
    assert life.append("a", 1, 1).epoch == epoch
    life.archive.close()
    life.disk.power_off()
    assert life.again().append("a", 1, 2).epoch == epoch
