"""What is damaged in the files of a memory is found: every bit, every length, every file."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from memstore.errors import Corrupt
from memstore.memory import Memory
from tests.fakes import FakeDisk
from tests.lives import FOLDER, SPEC, Life


def _bits(content: bytes) -> list[bytes]:
    """The content with each of its bits flipped once."""
    flipped = []
    for at in range(len(content) * 8):
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        flipped.append(bytes(changed))
    return flipped


def _small() -> Life:
    life = Life(FakeDisk(), replace(SPEC, dim=1, dtype=torch.float16), is_new=True)
    life.append("a", 2, 0)
    life.append("b", 1, 0)
    life.append("a", 1, 1)
    return life


def test_every_flipped_bit_of_a_log_is_found() -> None:
    life = _small()
    path = FOLDER / "log-00000001"
    content = life.disk.files[path]
    for flipped in _bits(content):
        life.disk.files = {path: flipped}
        with pytest.raises(Corrupt):
            life.again()
        assert life.disk.files == {path: flipped}  # and is left for whoever looks into it


def test_every_flipped_bit_of_a_log_is_found_or_cut_after_a_loss_of_power() -> None:
    life = Life(FakeDisk(), replace(SPEC, dim=1), is_new=True)
    pictures = [life.picture()]
    for seq in range(3):
        life.append("a", 1, seq)
        life.memory.settle(lambda problem: None)
        pictures.append(life.picture())
    path = FOLDER / "log-00000001"
    content = life.disk.files[path]
    life.disk.power_off()
    outcomes = set()
    for flipped in _bits(content):
        life.disk.files = {path: flipped}
        try:
            again = life.again()
        except Corrupt:
            outcomes.add("found")
            continue
        assert again.found is not None
        assert again.found.cut_bytes > 0
        outcomes.add(str(pictures.index(again.picture())))
    # Only the last record can be taken for torn: it is the one that nothing behind it says was synced.
    assert outcomes == {"found", "2"}


def test_every_truncation_of_a_log_gives_a_prefix_or_is_found() -> None:
    life = Life(FakeDisk(), replace(SPEC, dim=1), is_new=True)
    pictures = [life.picture()]
    for seq in range(3):
        life.append("a", 1, seq)
        pictures.append(life.picture())
    path = FOLDER / "log-00000001"
    content = life.disk.files[path]
    life.archive.close()
    closed = life.disk.files[FOLDER / "closed"]
    seen = set()
    for size in range(len(content)):
        life.disk.files = {path: content[:size], FOLDER / "closed": closed}
        with pytest.raises(Corrupt):
            life.again()
        life.disk.files = {path: content[:size]}
        try:
            seen.add(pictures.index(life.again().picture()))
        except Corrupt:
            assert size < 200  # within the head
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("name", ["manifest.json", "rows.bin", "replies.bin", "closed"])
def test_every_flipped_bit_and_every_truncation_of_a_snapshot_is_found(name: str) -> None:
    life = _small()
    life.snapshot()
    life.archive.close()
    path = FOLDER / name if name == "closed" else FOLDER / "snapshot-00000002" / name
    files = dict(life.disk.files)
    content = files[path]
    assert content
    for spoilt in [*_bits(content), *(content[:size] for size in range(len(content)))]:
        life.disk.files = {**files, path: spoilt}
        with pytest.raises(Corrupt):
            life.again()
    life.disk.files = dict(files)
    life.again()


@pytest.mark.parametrize("lost", ["log-00000002", "snapshot-00000002/rows.bin", "snapshot-00000002/manifest.json"])
def test_a_missing_file_is_found(lost: str) -> None:
    life = _small()
    life.snapshot()
    life.disk.files.pop(FOLDER / lost)
    with pytest.raises((Corrupt, FileNotFoundError)):
        life.again()


def test_files_of_another_memory_are_not_believed() -> None:
    life = _small()
    for has_snapshot in (False, True):
        if has_snapshot:
            life.snapshot()
        other = Memory(life.memory.spec, torch.device("cpu"), new_epoch=itertools.count(1).__next__)
        with pytest.raises(Corrupt, match="of another memory"):
            life.archive.recover(life.folder, "other", other, life.syncer, lambda done, total: None)
