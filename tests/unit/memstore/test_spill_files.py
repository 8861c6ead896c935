"""Files of sequences that have left: when they go, what a full disk does, and that damage is found."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from memstore.errors import Corrupt, QuotaExceeded
from memstore.types import SpillSpec
from tests.fakes import FakeAppendFile, FakeDisk
from tests.lives import batch, found
from tests.spilling import FOLDER, SPEC, Watched, looked, plain

if TYPE_CHECKING:
    from pathlib import Path


def test_files_go_when_nobody_needs_them() -> None:
    watched = Watched()
    watched.append("abcde")
    assert len(watched.disk.files) == 2
    assert watched.counts.disk_bytes == sum(map(len, watched.disk.files.values()))
    found(watched.memory, "a")
    assert len(watched.disk.files) == 2, "another one went there"
    watched.memory.reset(list("abcde"), release=True)
    assert not watched.disk.files
    assert watched.counts.disk_bytes == 0
    watched.append("abcde")
    watched.memory.free()
    watched.memory.remove_files()
    assert not watched.disk.files


def test_a_file_that_could_not_be_removed_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, ample = Watched(), Watched(plain(SPEC))
    watched.disk.files[FOLDER / "sequence-00000001"] = b"left over"
    for each in (watched, ample):
        each.append("abc")
    with monkeypatch.context() as failing:
        failing.setattr(watched.disk, "remove", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        watched.disk.is_full = True
        failing.setattr(watched.disk, "scratch", lambda path: _created(watched.disk, path))
        (refused,) = watched.step(batch(SPEC, "d", 1, 0))
        assert isinstance(refused, QuotaExceeded)
    watched.disk.is_full = False
    assert FOLDER / "sequence-00000000" in watched.disk.files, "half of a file, which could not be removed"
    for each in (watched, ample):
        each.append("de")
    for name in "abcde":
        assert looked(watched.memory, name) == looked(ample.memory, name)
    assert watched.disk.files[FOLDER / "sequence-00000001"] == b"left over"
    watched.memory.free()
    watched.memory.remove_files()
    assert not watched.disk.files


def _created(disk: FakeDisk, path: Path) -> FakeAppendFile:
    """A file on a disk on which names have room, and content has none."""
    if path in disk.files:
        raise FileExistsError(17, "File exists", str(path))
    disk.files[path] = b""
    return FakeAppendFile(disk, path)


def test_a_full_disk_refuses_what_needs_it_and_loses_nothing() -> None:
    watched, ample = Watched(), Watched(plain(SPEC))
    for each in (watched, ample):
        each.append("abc")
    watched.disk.is_full = True
    for _ in range(3):
        (refused,) = watched.step(batch(SPEC, "d", 1, 0))
        assert isinstance(refused, QuotaExceeded)
        assert "disk" in str(refused)
    assert watched.tiers == (2, 1, 0)
    assert not watched.disk.files
    assert watched.resident() == "bc"
    for name in "abcab":  # what changes places in memory needs no disk
        assert looked(watched.memory, name) == looked(ample.memory, name)
    watched.disk.is_full = False
    watched.append("de")
    for name in "abc":
        assert looked(watched.memory, name) == looked(ample.memory, name)


def test_without_a_folder_host_memory_is_enough_for_what_may_lie_there() -> None:
    spec = replace(SPEC, spill=SpillSpec(max_sequences=3, host_sequences=3))
    watched = Watched(spec)
    assert watched.memory.lifecycle.spill is not None
    watched.memory.lifecycle.spill.tiers.files.folder = None
    watched.append("abcde")
    for seq in range(1, 4):
        watched.append("abcdeedcba"[5 * (seq % 2) :][:5], 1, seq)
    assert watched.tiers == (2, 3, 0)


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_a_file_is_found(bit: int) -> None:
    watched = Watched(replace(SPEC, spill=SpillSpec(max_sequences=1)))
    watched.append("abc")
    ((path, content),) = watched.disk.files.items()
    for at in range(len(content)):
        spoilt = bytearray(content)
        spoilt[at] ^= 1 << bit
        watched.disk.files[path] = bytes(spoilt)
        (result,) = watched.step(batch(SPEC, "a", 0, 1))
        assert isinstance(result, Corrupt), f"bit {bit} of byte {at}"
    assert watched.tiers == (2, 0, 1)


def test_every_truncation_of_a_file_is_found_and_a_reset_helps() -> None:
    watched = Watched(replace(SPEC, spill=SpillSpec(max_sequences=2)))
    watched.append("abc")
    ((path, content),) = watched.disk.files.items()
    for end in range(len(content)):
        watched.disk.files[path] = content[:end]
        (result,) = watched.step(batch(SPEC, "a", 0, 1))
        assert isinstance(result, Corrupt)
    watched.disk.files[path] = content + b"\0"
    assert isinstance(watched.step(batch(SPEC, "a", 0, 1))[0], Corrupt)
    del watched.disk.files[path]
    assert isinstance(watched.step(batch(SPEC, "a", 0, 1))[0], Corrupt)
    watched.append("bc", 1, 1)
    watched.memory.reset(["a"], release=False)
    watched.append("a", 2)
    assert found(watched.memory, "a").sequences[0].as_of == 2
