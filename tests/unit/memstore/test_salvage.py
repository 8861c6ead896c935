"""Spilled files that fail: the next snapshot takes their sequences from log and snapshot, and spills them anew."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import pytest
import torch

from memstore import ring
from memstore.errors import Corrupt, MemstoreError, NotReady
from memstore.places import Places
from memstore.row_bytes import RowFormat
from memstore.salvage import Salvage
from memstore.snapshotter import MEND_S, Snapshotter
from memstore.tiers import scratch_slab
from memstore.types import Metric, SpillSpec
from tests.fakes import FakeClock, FakeDisk
from tests.lives import SPEC, SPILLED, Life, OneMemory, contents, found
from tests.serving import Unwatched
from tests.spilling import RICH

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from memstore.types import MemorySpec

SPILLING = replace(SPEC, max_sequences=2, spill=SpillSpec(max_sequences=4))
SPECS = [SPILLING, replace(RICH, durability=SPEC.durability, spill=SpillSpec(max_sequences=4, host_sequences=1))]
NAMES = "abcdef"


class UnreadableDisk(FakeDisk):
    """Has files that cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.unreadable: set[Path] = set()

    def open(self, path: Path):  # type: ignore[no-untyped-def]
        if path in self.unreadable:
            raise OSError(5, "Input/output error")
        return super().open(path)


class CountingDisk(FakeDisk):
    """Notes what is opened to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[Path] = []

    def open(self, path: Path):  # type: ignore[no-untyped-def]
        self.opened.append(path)
        return super().open(path)


def filled(spec: MemorySpec, *, has_snapshot: bool) -> Life:
    """Six sequences, of which one is a fork of one that has gone on since, one of one that has gone, one begun anew."""
    life = Life(UnreadableDisk(), spec, is_new=True)
    life.append("a", 3, 0, value=1)
    life.append("b", 3, 0, value=2)
    life.append("gone", 2, 0, value=3)
    life.append("gone", 1, 0, writer="v", value=4)
    life.memory.fork("gone", "c", 2, 0)
    life.memory.reset(["gone"], release=True)
    if has_snapshot:
        assert life.snapshot()
    life.memory.fork("a", "d", None, 0)
    life.append("a", 3, 1, value=5)
    life.append("d", 1, 0, value=6)
    life.append("b", 2, 0, value=7, start=True)
    life.append("e", 9, 0, value=8)
    life.append("f", 0, 0, value=9)
    life.append("c", 1, 0, value=10)
    life.memory.reset(["f"], release=False)
    for name in "fa":
        use(life, name)
    return life


def use(life: Life, name: str) -> None:
    """An append of nothing; whoever is away comes back for it."""
    life.append(name, 0, writer="")


def spilled(life: Life) -> list[Path]:
    """Its files."""
    return sorted(path for path in life.disk.files if SPILLED in path.parents)


def flip(life: Life, path: Path) -> None:
    """A bit in the rows."""
    content = bytearray(life.disk.files[path])
    content[-1] ^= 1
    life.disk.files[path] = bytes(content)


def flip_head(life: Life, path: Path) -> None:
    """A bit in what is known of the sequence."""
    content = bytearray(life.disk.files[path])
    content[40] ^= 1
    life.disk.files[path] = bytes(content)


def cut(life: Life, path: Path) -> None:
    """The last byte is missing."""
    life.disk.files[path] = life.disk.files[path][:-1]


def lose(life: Life, path: Path) -> None:
    """The file is missing."""
    del life.disk.files[path]


def block(life: Life, path: Path) -> None:
    """The file cannot be read."""
    assert isinstance(life.disk, UnreadableDisk)
    life.disk.unreadable.add(path)


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "rich"])
@pytest.mark.parametrize("has_snapshot", [False, True], ids=["log", "snapshot"])
@pytest.mark.parametrize("spoil", [flip, flip_head, cut, lose, block])
def test_a_snapshot_goes_on_with_sequences_whose_files_fail_and_mends_them(
    spoil: Callable[[Life, Path], None], has_snapshot: bool, spec: MemorySpec
) -> None:
    life = filled(spec, has_snapshot=has_snapshot)
    before = contents(life.memory)
    answers = {name: found(filled(spec, has_snapshot=has_snapshot).memory, name).sequences for name in NAMES}
    damaged = spilled(life)
    assert len(damaged) >= 3
    for path in damaged:
        spoil(life, path)
    for name in NAMES:
        with suppress(Corrupt, NotReady):
            use(life, name)
    assert life.snapshot()
    assert contents(life.memory) == before
    assert {name: found(life.memory, name).sequences for name in NAMES} == answers
    assert life.append("c", 1, 0, value=10).is_replay
    assert life.append("e", 9, 0, value=8).is_replay
    after = contents(life.memory)
    assert contents(life.again().memory) == after


def test_one_whose_file_fails_is_said_until_then_and_the_others_are_not() -> None:
    life = filled(SPILLING, has_snapshot=True)
    first = spilled(life)[0]
    place = Places.of(SPILLING).filed(int(first.name.partition("-")[2]))
    (lost,) = [name for name in NAMES if life.memory._table[name].place == place]
    flip(life, first)
    for _ in range(2):
        with pytest.raises(Corrupt, match=f"'{lost}'"):
            life.append(lost, 1, 9)
    for name in NAMES.replace(lost, ""):
        use(life, name)
    assert life.snapshot()
    use(life, lost)
    counts = life.memory.counts().spill
    assert counts is not None
    assert counts.disk_bytes == sum(len(life.disk.files[path]) for path in spilled(life))


def test_a_snapshot_is_due_soon_after_a_file_has_failed() -> None:
    clock, life = FakeClock(), filled(SPILLING, has_snapshot=True)
    registry = OneMemory(life)
    snapshotter = Snapshotter(registry, clock, 100.0, Unwatched())  # type: ignore[arg-type]
    snapshotter.finish()
    assert not life.archive.journal.num_kept
    for path in spilled(life):
        flip(life, path)
    places = Places.of(SPILLING)
    name = next(name for name in NAMES if places.is_filed(life.memory._table[name].place))
    with pytest.raises(Corrupt):
        use(life, name)
    assert not snapshotter._is_due(registry)  # type: ignore[arg-type]
    clock.advance(MEND_S)
    assert snapshotter._is_due(registry)  # type: ignore[arg-type]
    snapshotter._take(registry)  # type: ignore[arg-type]
    clock.advance(MEND_S)
    assert not snapshotter._is_due(registry)  # type: ignore[arg-type]
    use(life, name)


def test_where_the_log_fails_too_nothing_is_left_out_and_all_stays_as_it_was() -> None:
    life = filled(SPILLING, has_snapshot=False)
    for path in spilled(life):
        flip(life, path)
    log = life.folder.segment(1)
    content = bytearray(life.disk.files[log])
    content[-1] ^= 1
    life.disk.files[log] = bytes(content)
    for _ in range(2):
        with pytest.raises(Corrupt):
            life.snapshot()
        assert not life.folder.snapshots()
        assert life.folder.segments()[0] == 1
    life.memory.reset(list(NAMES), release=True)
    assert life.snapshot(), "nothing of it is needed any more"
    assert not life.again().memory._table._by_name


def test_a_damaged_snapshot_gives_way_to_the_one_before_while_that_is_there() -> None:
    life = filled(SPILLING, has_snapshot=True)
    older = dict(life.disk.files)
    assert life.snapshot()
    before = contents(life.memory)
    life.disk.files = {**older, **life.disk.files}
    newest = life.folder.snapshot(life.folder.snapshots()[-1]) / "rows.bin"
    life.disk.files[newest] = life.disk.files[newest][:-1] + b"\xff"
    life = life.again()
    assert contents(life.memory) == before
    assert spilled(life)
    for path in spilled(life):
        flip(life, path)
    assert life.snapshot()
    assert contents(life.memory) == before
    assert contents(life.again().memory) == before


def test_however_many_were_forked_the_log_is_read_twice() -> None:
    life = Life(CountingDisk(), replace(SPEC, max_sequences=20), is_new=True)
    forks = []
    for number in range(5):
        life.append(f"source {number}", 2, 0, value=number)
        life.memory.fork(f"source {number}", f"fork {number}", None, 0)
        forks.append(f"fork {number}")
    assert isinstance(life.disk, CountingDisk)
    life.disk.opened.clear()
    salvage = Salvage(life.folder, life.memory.spec, life.archive._segment + 1, forks)
    assert life.disk.opened == [life.folder.segment(1)] * 2
    for name in forks:
        assert salvage.sequence(name).next_position == 2


def test_a_full_disk_leaves_the_file_as_it_is_and_the_snapshot_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    life = filled(SPILLING, has_snapshot=False)
    before = contents(life.memory)
    for path in spilled(life):
        flip(life, path)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(life.disk, "scratch", full)
        assert life.snapshot()
    with pytest.raises(Corrupt):
        contents(life.memory)
    assert life.snapshot(), "the next one has them from this one"
    assert contents(life.memory) == before
    assert contents(life.again().memory) == before


@pytest.mark.parametrize("seed", range(20))
def test_whatever_was_done_what_is_salvaged_is_what_is_there(seed: int) -> None:
    random = Random(seed)
    spec = replace(
        SPEC, max_sequences=3, metric=random.choice(list(Metric)), spill=SpillSpec(max_sequences=4, host_sequences=1)
    )
    life = Life(FakeDisk(Random(seed)), replace(spec, num_layers=random.randint(1, 2)), is_new=True)
    seqs: dict[str, int] = {}
    for step in range(60):
        name, other = random.choice(NAMES), random.choice(NAMES)
        what = random.choices(("append", "fork", "reset", "pin", "snapshot", "restart"), (12, 4, 2, 1, 1, 1))[0]
        try:
            if what == "append":
                start = random.random() < 0.2
                life.append(name, random.randint(0, 6), 0 if start else seqs.get(name, 0), value=step, start=start)
                seqs[name] = 1 if start else seqs.get(name, 0) + 1
            elif what == "fork":
                life.memory.fork(name, other, None, 0)
                seqs[other] = 0
            elif what == "reset":
                life.memory.reset([name], release=random.random() < 0.5)
                seqs.pop(name, None)
            elif what == "pin":
                life.memory.pin([name], random.random() < 0.3)
            elif what == "snapshot":
                life.snapshot()
            else:
                life.archive.journal.sync()
                life.disk.power_off()
                life = life.again()
        except MemstoreError:
            """It did not fit."""
    spec = life.memory.spec
    salvage = Salvage(life.folder, spec, life.archive._segment + 1, [name for name, _ in life.memory._table.items()])
    expected = contents(life.memory)
    for name, sequence in dict(expected["sequences"]).items():  # type: ignore[call-overload]
        assert replace(salvage.sequence(name), place=0) == sequence
        scratch = scratch_slab(spec)
        salvage.fill(name, scratch)
        rows = [
            scratch.rows(torch.arange(run.slot, run.slot + run.length))
            for run in ring.runs(sequence.begin(spec.capacity), sequence.next_position, spec.capacity)
        ]
        found = [b"".join(map(bytes, RowFormat(spec).encode(each))) for each in rows]
        assert found == expected["rows"][name]  # type: ignore[index]
