"""Spilled sequences of durable memories: what a restart finds, snapshots that are taken meanwhile, and damage."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from memstore import still
from memstore.errors import Corrupt, MemstoreError, NotReady, QuotaExceeded
from memstore.places import Places
from memstore.recovery import Filling
from memstore.sequence import Sequence
from memstore.snapshot import Snapshot
from memstore.types import Durability, Metric, SpillSpec
from tests.fakes import FakeAppendFile, FakeDisk, FakeReadFile
from tests.lives import SPEC, SPILLED, Life, contents, found
from tests.spilling import RICH

if TYPE_CHECKING:
    from pathlib import Path

    from memstore.arrivals import Arrivals
    from memstore.types import MemorySpec

SPILLING = replace(SPEC, max_sequences=2, spill=SpillSpec(max_sequences=3, host_sequences=1))
SPECS = [
    SPILLING,
    replace(SPILLING, durability=Durability.INTERVAL, metric=Metric.INNER_PRODUCT, spill=SpillSpec(max_sequences=3)),
    replace(RICH, durability=Durability.ALWAYS, spill=SpillSpec(max_sequences=3, host_sequences=3)),
]


def filled(spec: MemorySpec) -> Life:
    """Five sequences that have wrapped, one of them pinned and one emptied where it lies."""
    life = Life(FakeDisk(), spec, is_new=True)
    for seq in range(2):
        for name in "abcde":
            life.append(name, 3, seq, value=ord(name))
    life.memory.pin(["c"], True)
    life.memory.reset(["d"], release=False)
    return life


@pytest.mark.parametrize("spec", SPECS, ids=["both", "disk", "host"])
@pytest.mark.parametrize("has_snapshot", [False, True], ids=["log", "snapshot"])
def test_a_restart_finds_every_sequence_wherever_it_lay(spec: MemorySpec, has_snapshot: bool) -> None:
    life = filled(spec)
    if has_snapshot:
        assert life.snapshot()
        life.append("a", 1, 2)
    before = contents(life.memory)
    answers = {name: found(life.memory, name).sequences for name in "abcde"}
    again = life.again()
    assert contents(again.memory) == before
    assert {name: found(again.memory, name).sequences for name in "abcde"} == answers
    assert again.append("b", 3, 1, value=ord("b")).is_replay
    counts = again.memory.counts()
    assert counts.num_pinned == 1
    assert counts.spill is not None
    assert counts.spill.num_on_host <= spec.spill.host_sequences
    assert counts.spill.num_resident <= 2


def test_what_was_spilled_is_no_part_of_what_lasts() -> None:
    life = filled(SPILLING)
    before = contents(life.memory)
    spilled = [path for path in life.disk.files if SPILLED in path.parents]
    assert spilled
    for path in spilled:
        life.disk.files[path] = b"nonsense"
    again = life.again()
    assert contents(again.memory) == before


def test_a_damaged_file_is_said_and_a_restart_has_the_rows() -> None:
    life = filled(SPILLING)
    before = contents(life.memory)
    for path in [path for path in life.disk.files if SPILLED in path.parents]:
        life.disk.files[path] = life.disk.files[path][:-1]
    lost = [name for name in "abcde" if life.memory._table[name].place > 3]
    assert lost
    with pytest.raises(Corrupt, match=f"'{lost[0]}'"):
        life.append(lost[0], 1, 2)
    assert contents(life.again().memory) == before


@pytest.mark.parametrize("has_snapshot", [False, True], ids=["log", "snapshot"])
def test_a_come_back_that_fails_in_a_full_memory_leaves_it_as_it_was(has_snapshot: bool) -> None:
    life = Life(FakeDisk(), replace(SPEC, max_sequences=2, spill=SpillSpec(max_sequences=2)), is_new=True)
    for name in "abcd":
        life.append(name, 1, 0, value=ord(name))
    counts = life.memory.counts().spill
    path = min(path for path in life.disk.files if SPILLED in path.parents)
    content = life.disk.files[path]
    life.disk.files[path] = content[:-1]
    with pytest.raises(Corrupt):
        life.append("a", 1, 1)
    life.disk.files[path] = content
    after = life.memory.counts().spill
    assert counts is not None and after is not None
    assert (after.num_resident, after.num_on_host, after.num_on_disk) == (2, 0, 2)
    with pytest.raises(QuotaExceeded):
        life.append("e", 1, 0)
    assert not has_snapshot or life.snapshot()
    before = contents(life.memory)
    again = life.again()
    assert contents(again.memory) == before


@pytest.mark.parametrize("spec", SPECS, ids=["both", "disk", "host"])
def test_a_snapshot_is_of_one_moment_though_sequences_come_and_go(
    spec: MemorySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(still, "PIECE_BYTES", 1)
    life = filled(spec)
    before = contents(life.memory)
    seqs = {**dict.fromkeys("abcde", 2), "d": 0}
    calls: list[str] = []
    take = still.Still.take

    def use_and_take(self: still.Still, piece: still.Piece) -> list[memoryview]:
        """Another sequence is used before each piece."""
        name = "abedcbae"[len(calls) % 8]
        calls.append(name)
        life.append(name, 1, seqs[name])
        seqs[name] += 1
        return take(self, piece)

    with monkeypatch.context() as patch:
        patch.setattr(still.Still, "take", use_and_take)
        assert life.snapshot()
    assert len(calls) == 4 * 4
    after = contents(life.memory)
    assert after != before
    (number,) = life.folder.snapshots()
    blank = Life(FakeDisk(), spec, is_new=True).memory
    Filling(blank, lambda _: None).load(Snapshot(life.disk, life.folder.snapshot(number)))
    assert contents(blank) == before
    assert life.memory.lifecycle.spill is not None
    spill, counts = life.memory.lifecycle.spill, life.memory.counts().spill
    assert counts is not None
    assert spill.tiers.has_room
    assert len([path for path in life.disk.files if SPILLED in path.parents]) == counts.num_on_disk
    assert contents(life.again().memory) == after, "the log goes on behind the snapshot"


def test_a_snapshot_that_mixes_or_lacks_rows_of_sequences_without_a_place_is_refused() -> None:
    spec = replace(SPILLING, spill=SpillSpec(max_sequences=3, host_sequences=3))
    slots = torch.arange(2)
    rows = Life(FakeDisk(), spec, is_new=True).memory._slab.rows(slots)

    def refill(*places: int) -> Arrivals:
        """One that expects two sequences of four rows each, in these places."""
        spill = Life(FakeDisk(), spec, is_new=True).memory.lifecycle.spill
        assert spill is not None
        spill.arrivals.expect({f"{at}": Sequence(place, 1, 4) for at, place in enumerate(places)}, 4)
        return spill.arrivals

    with pytest.raises(Corrupt, match="in one place"):
        refill(7, 7)
    with pytest.raises(Corrupt, match="does not have"):
        refill(7, 8).put(9, 2, rows, slots)
    begun = refill(7, 8)
    begun.put(7, 2, rows, slots)
    with pytest.raises(Corrupt, match="mixes"):
        begun.put(8, 2, rows, slots)
    with pytest.raises(Corrupt, match=r"'0'.* lacks rows"):
        begun.check_whole()


def test_places_are_counted_through_slab_host_memory_and_files() -> None:
    places = Places.of(replace(SPILLING, max_sequences=2, spill=SpillSpec(max_sequences=3, host_sequences=1)))
    assert [places.is_on_device(place) for place in range(6)] == [True, True, False, False, False, False]
    assert [places.is_filed(place) for place in range(6)] == [False, False, False, False, True, True]
    assert [places.host_number(places.on_host(number)) for number in range(2)] == [0, 1]
    assert [places.on_host(number) for number in range(2)] == [2, 3]
    assert [places.filed(number) for number in (0, 7)] == [4, 11]
    assert [places.file_number(place) for place in (4, 11)] == [0, 7]


def test_pins_and_ends_are_logged() -> None:
    life = Life(FakeDisk(), replace(SPILLING, idle_ttl_s=10), is_new=True)
    for name in "abcd":
        life.append(name)
    life.memory.pin(["a", "b"], True)
    life.memory.pin(["a"], False)
    life.memory.lifecycle.clock = _Later(life.memory.lifecycle.clock.monotonic() + 100)
    assert life.memory.expire() == 3
    again = life.again()
    assert [name for name, _ in again.memory._table.items()] == ["b"]
    assert again.memory.counts().num_pinned == 1
    assert again.memory.expire() == 0, "time begins anew"


def test_a_full_disk_refuses_the_call_and_nothing_is_logged() -> None:
    life = filled(SPILLING)
    life.memory.reset(["e"], release=True)
    before, log_bytes = contents(life.memory), life.archive.journal.log_bytes
    life.disk.is_full = True
    refused = 0
    for name in "abde":
        try:
            life.append(name, 1, 9)
        except QuotaExceeded:
            refused += 1
        except MemstoreError:
            """A gap, or the log is refused."""
    assert refused
    assert contents(life.memory) == before
    assert life.archive.journal.log_bytes == log_bytes
    life.disk.is_full = False
    assert contents(life.again().memory) == before


@pytest.mark.parametrize("trouble", ["full", "unreadable", "spoilt"])
@pytest.mark.parametrize("has_snapshot", [False, True], ids=["log", "snapshot"])
def test_a_disk_that_fails_while_a_log_is_done_again_is_no_damage(has_snapshot: bool, trouble: str) -> None:
    life = filled(SPILLING)
    assert not has_snapshot or life.snapshot()
    for seq, name in enumerate("abab", start=2):
        life.append(name, 1, seq // 2 + 1)
    for name in "ced":
        life.append(name, 0, writer="")  # who is away comes back
    before = contents(life.memory)
    disk = TroubledDisk(trouble)
    disk.files = dict(life.disk.files)
    life.disk = disk
    with pytest.raises((OSError, NotReady)):
        life.again()
    assert disk.num_troubles
    disk.trouble = ""
    assert contents(life.again().memory) == before


class TroubledDisk(FakeDisk):
    """Files of spilled sequences cannot be written, or cannot be read, or are read with another content."""

    def __init__(self, trouble: str) -> None:
        super().__init__()
        self.trouble = trouble
        self.num_troubles = 0

    def scratch(self, path: Path) -> FakeAppendFile:
        if self.trouble == "full":
            self.num_troubles += 1
            raise OSError(28, "No space left on device")
        return super().scratch(path)

    def open(self, path: Path) -> FakeReadFile:
        if SPILLED in path.parents and self.trouble:
            self.num_troubles += 1
            if self.trouble == "unreadable":
                raise OSError(5, "Input/output error")
            return FakeReadFile(b"nonsense")
        return super().open(path)


class _Later:
    """A clock that stands."""

    def __init__(self, now: float) -> None:
        self._now = now

    def monotonic(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._now
