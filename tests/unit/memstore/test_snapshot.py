"""Snapshots: a picture of one moment while the memory goes on, safe at every step, and readable by later releases."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
import torch

from memstore import still as still_module
from memstore.errors import Corrupt
from memstore.folder import MemoryFolder
from memstore.log import MAGIC
from memstore.recovery import Recovery
from memstore.seams import SystemDisk
from memstore.types import Durability, MemorySpec, Metric, PayloadSpec
from tests.fakes import FakeDisk, FakeReadFile
from tests.lives import FOLDER, SPEC, Life, found, picture

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

T = TypeVar("T")
GOLDEN = Path(__file__).resolve().parents[2] / "data" / "memory-format-1"
GOLDEN_SPEC = MemorySpec(
    name="m",
    dim=3,
    capacity=4,
    max_sequences=3,
    num_layers=2,
    metric=Metric.COSINE,
    dtype=torch.bfloat16,
    durability=Durability.ALWAYS,
    payloads=(PayloadSpec(name="hidden", dtype=torch.int32, shape=(2,)),),
)


def _fill(life: Life) -> None:
    for seq in range(5):
        life.append("a", 2, seq)
        life.append("b", 1, seq, writer="v")
    life.memory.fork("a", "c", None, 0)


def test_a_restored_memory_answers_the_same_on_its_device(device: torch.device) -> None:
    life = Life(FakeDisk(), GOLDEN_SPEC, is_new=True, device=device)
    _fill(life)
    assert life.snapshot()
    life.append("c", 3, 0)
    before, answer = life.picture(), found(life.memory, "c")
    again = life.again()
    assert again.picture() == before
    restored = found(again.memory, "c")
    assert answer.hits is not None
    assert restored.hits is not None
    assert torch.equal(restored.hits.index, answer.hits.index)
    assert answer.hits.scores is not None
    assert restored.hits.scores is not None
    assert torch.equal(restored.hits.scores, answer.hits.scores)


def test_a_snapshot_is_of_one_moment_whatever_happens_between_its_pieces(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(still_module, "PIECE_BYTES", 1)  # one row at a time
    life = Life(FakeDisk(), replace(SPEC, max_sequences=4), is_new=True, device=device)
    _fill(life)
    before = life.picture()
    calls = iter(
        [
            lambda: life.append("a", 1, 5),
            lambda: life.memory.reset(["b"], release=True),
            lambda: life.memory.fork("a", "d", None, 0),  # into the place of "b"
            lambda: life.append("a", 3, 0, start=True),
            lambda: life.append("new", 4, 0),
        ]
    )

    def control(run: Callable[[], T], /) -> Future[T]:
        outcome = life.control(run)
        next(calls, lambda: None)()
        return outcome

    assert life.archive.snapshot(life.memory, control)
    after, files = life.picture(), dict(life.disk.files)
    path = FOLDER / "log-00000002"
    head = files[path].split(MAGIC)[1]
    life.disk.files[path] = MAGIC + head  # without what came after that moment
    assert life.again().picture() == before
    life.disk.files = files
    assert life.again().picture() == after


def test_a_snapshot_makes_the_log_short(tmp_path: Path) -> None:
    life = Life(FakeDisk(), is_new=True)
    _fill(life)
    long = life.archive.journal.log_bytes
    assert life.snapshot()
    assert life.archive.journal.log_bytes < long / 2
    assert life.archive.journal.num_kept == 0
    assert sorted(life.disk.names(FOLDER)) == ["log-00000002", "snapshot-00000002"]
    life.append("a", 1, 5)
    assert life.archive.journal.num_kept == 1
    assert life.snapshot()
    assert sorted(life.disk.names(FOLDER)) == ["log-00000003", "snapshot-00000003"]


def test_a_snapshot_that_fails_leaves_what_was_there() -> None:
    life = Life(FakeDisk(), is_new=True)
    _fill(life)
    assert life.snapshot()
    life.append("a", 1, 5)
    before = life.picture()
    life.disk.is_full = True
    with pytest.raises(OSError, match="No space"):
        life.snapshot()
    life.disk.is_full = False
    life = life.again()
    assert life.picture() == before
    assert life.snapshot()
    assert life.again().picture() == before


class SpoilingDisk(FakeDisk):
    """Has something else of a snapshot's rows than what was written."""

    is_spoiling = False

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        rows = target / "rows.bin"
        if self.is_spoiling:
            self.files[rows] = bytes([self.files[rows][0] ^ 1]) + self.files[rows][1:]


def test_a_snapshot_that_cannot_be_read_back_replaces_nothing() -> None:
    disk = SpoilingDisk()
    life = Life(disk, is_new=True)
    _fill(life)
    assert life.snapshot()
    life.append("a", 1, 5)
    before = life.picture()
    disk.is_spoiling = True
    with pytest.raises(Corrupt):
        life.snapshot()
    assert life.archive.has_failed
    assert life.again().picture() == before


def test_a_disk_that_fills_up_while_a_snapshot_is_written_gets_its_room_back() -> None:
    life = Life(FakeDisk(), is_new=True)
    _fill(life)
    before = life.picture()

    def control(run: Callable[[], T], /) -> Future[T]:
        outcome = life.control(run)
        life.disk.is_full = True
        return outcome

    with pytest.raises(OSError, match="No space"):
        life.archive.snapshot(life.memory, control)
    assert life.archive.has_failed
    assert life.disk.names(FOLDER) == ["log-00000001", "log-00000002"]
    life.disk.is_full = False
    assert life.snapshot()
    assert not life.archive.has_failed
    assert life.disk.names(FOLDER) == ["log-00000003", "snapshot-00000003"]
    assert life.again().picture() == before


def test_a_snapshot_is_not_taken_behind_a_log_that_cannot_be_synced() -> None:
    life = Life(FakeDisk(), is_new=True)
    _fill(life)

    def control(run: Callable[[], T], /) -> Future[T]:
        outcome = life.control(run)
        life.disk.cannot_sync = life.disk.names(FOLDER) == ["log-00000001", "log-00000002"]
        return outcome

    assert not life.archive.snapshot(life.memory, control)
    assert life.folder.snapshots() == []


def test_a_damaged_snapshot_gives_way_to_the_one_before_while_that_is_there() -> None:
    life = Life(FakeDisk(), is_new=True)
    _fill(life)
    assert life.snapshot()
    older = dict(life.disk.files)
    life.append("a", 1, 5)
    before = life.picture()
    older[FOLDER / "log-00000002"] = life.disk.files[FOLDER / "log-00000002"]
    assert life.snapshot()
    life.disk.files = {**older, **life.disk.files}
    rows = FOLDER / "snapshot-00000003" / "rows.bin"
    life.disk.files[rows] = life.disk.files[rows][:-1] + b"\xff"
    assert life.again().picture() == before
    del life.disk.files[FOLDER / "snapshot-00000002" / "manifest.json"]
    with pytest.raises(Corrupt):
        life.again()


def test_a_damaged_snapshot_gives_way_to_the_log_while_all_of_that_is_there() -> None:
    """As where the process was killed before the first snapshot had been read back."""
    life = Life(FakeDisk(), is_new=True)
    _fill(life)
    before = life.picture()
    older = dict(life.disk.files)
    assert life.snapshot()
    life.disk.files = {**older, **life.disk.files}
    rows = FOLDER / "snapshot-00000002" / "rows.bin"
    life.disk.files[rows] = life.disk.files[rows][:-1] + b"\xff"
    life = life.again()
    assert life.picture() == before
    assert life.snapshot()
    assert life.disk.names(FOLDER) == ["log-00000004", "snapshot-00000004"]
    assert life.again().picture() == before


class BlindDisk(FakeDisk):
    """Cannot read a snapshot."""

    is_blind = False

    def open(self, path: Path) -> FakeReadFile:
        if self.is_blind and path.name == "rows.bin":
            raise OSError(5, "Input/output error")
        return super().open(path)


def test_a_snapshot_that_the_disk_does_not_give_back_is_removed() -> None:
    disk = BlindDisk()
    life = Life(disk, is_new=True)
    _fill(life)
    before = life.picture()
    disk.is_blind = True
    with pytest.raises(OSError, match="Input/output"):
        life.snapshot()
    assert disk.names(FOLDER) == ["log-00000001", "log-00000002"]
    disk.is_blind = False
    assert life.again().picture() == before


def test_a_snapshot_ends_when_its_memory_is_closed() -> None:
    life = Life(FakeDisk(), is_new=True)
    _fill(life)
    before = life.picture()

    def control(run: Callable[[], T], /) -> Future[T]:
        life.archive._is_closing.set()
        return life.control(run)

    assert not life.archive.snapshot(life.memory, control)
    life.archive.close()
    assert life.again().picture() == before


def test_a_memory_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    """Made by `python -m tests.unit.memstore.test_snapshot` with the release that first wrote this format."""
    shutil.copytree(GOLDEN, tmp_path / "m")
    life = Life(FakeDisk(), GOLDEN_SPEC, is_new=True)
    _fill(life)
    life.append("c", 3, 0)
    restored = Life(FakeDisk(), GOLDEN_SPEC, is_new=True)
    recovery = Recovery(MemoryFolder(tmp_path / "m", SystemDisk()), "m", lambda done, total: None)
    fresh = restored.blank()
    recovery.run(fresh)
    assert picture(fresh) == life.picture()


def make_golden() -> None:
    """Writes the folder that the test above reads."""
    life = Life(FakeDisk(), GOLDEN_SPEC, is_new=True)
    _fill(life)
    life.snapshot()
    life.append("c", 3, 0)
    life.archive.close()
    for path, content in life.disk.files.items():
        target = GOLDEN / path.relative_to(FOLDER)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


if __name__ == "__main__":
    make_golden()
