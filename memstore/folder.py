"""MemoryFolder: where the files of one durable memory lie, and what they are called. Never a name as a client gave it.

DATA/.spilled.1/                        what an earlier server had spilled, until it is removed
DATA/memories/TENANT/.NAME.1/           one that was dropped, until it is removed; at the latest at the next start
DATA/memories/TENANT/NAME/
    log-00000001, log-00000002, ...     segments of the log, each going on where the one before ends
    snapshot-00000002/                  the memory as it was when log-00000002 began
    .snapshot-00000003/                 one that is being written; removed at the next start
    closed                              where the log ended when the server stopped in order
    passing                             while it is dropped, until it is out of the catalogue and renamed
    restored                            until the first start after `memstore restore`
"""

from __future__ import annotations

import re
import zlib
from typing import TYPE_CHECKING
from urllib.parse import quote

from memstore.errors import Corrupt

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from memstore.seams import Disk

MEMORIES, SPILLED = "memories", "spilled"
FIRST_SEGMENT = 1
"""The segment that a new memory's log begins with."""
CLOSED, RESTORED, PASSING = "closed", "restored", "passing"
_RETIRED = re.compile(r"\..+\.\d{1,18}", re.DOTALL)
_RETIRED_SPILLED = re.compile(rf"\.{SPILLED}\.\d{{1,18}}")
_NUMBERED = re.compile(r"(log|snapshot)-(\d{8})")


def escaped(name: str) -> str:
    """A name as that of a file: [A-Za-z0-9_.~-] as they are, but not a leading dot; everything else as %XX."""
    plain = quote(name, safe="")
    return f"%2E{plain[1:]}" if plain.startswith(".") else plain


def path_of(data: Path, tenant: str, name: str) -> Path:
    """The folder of a memory in the data folder."""
    return data / MEMORIES / escaped(tenant) / escaped(name)


def spilled_path(data: Path, tenant: str, name: str, number: int) -> Path:
    """The folder of the spilled sequences of a memory. number: of this one among all that a server made."""
    return data / SPILLED / escaped(tenant) / f"{escaped(name)}~{number}"


def retired_path(path: Path, number: int) -> Path:
    """Where a folder of a memory that was dropped is until it is removed: beside it, where no memory's is."""
    return path.with_name(f".{path.name}.{number}")


def folders(data: Path, disk: Disk, *, are_retired: bool = False) -> list[Path]:
    """The folders of all memories in a data folder; or of those that were dropped, and are still to be removed."""
    return [
        data / MEMORIES / tenant / name
        for tenant in disk.names(data / MEMORIES)
        for name in disk.names(data / MEMORIES / tenant)
        if (_RETIRED.fullmatch(name) is not None if are_retired else not name.startswith("."))
    ]


def retire_spilled(data: Path, disk: Disk) -> None:
    """Puts all that was spilled out of the way of what will be; see `leftovers`."""
    if disk.names(data / SPILLED):
        number = number_behind(_retired_spilled(data, disk))
        disk.rename(data / SPILLED, retired_path(data / SPILLED, number))


def leftovers(data: Path, disk: Disk) -> list[Path]:
    """The folders in a data folder that nobody needs any more."""
    return [*_retired_spilled(data, disk), *folders(data, disk, are_retired=True)]


def number_behind(retired: Iterable[Path]) -> int:
    """The least that is larger than the number of any of these folders."""
    numbers = (path.suffix[1:] for path in retired)
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)


def _retired_spilled(data: Path, disk: Disk) -> list[Path]:
    return [data / name for name in disk.names(data) if _RETIRED_SPILLED.fullmatch(name)]


class MemoryFolder:
    """The files of one memory by their numbers. Every call may raise OSError."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self.disk = disk

    def segments(self) -> list[int]:
        """Numbers of the segments of the log, ascending."""
        return self._numbers("log")

    def snapshots(self) -> list[int]:
        """Numbers of the snapshots, ascending. The log goes on from the segment of the same number."""
        return self._numbers("snapshot")

    def segment(self, number: int) -> Path:
        """The file of a segment."""
        return self.path / f"log-{number:08d}"

    def snapshot(self, number: int) -> Path:
        """The folder of a snapshot."""
        return self.path / f"snapshot-{number:08d}"

    def partial(self, number: int) -> Path:
        """The folder of a snapshot while it is written."""
        return self.path / f".snapshot-{number:08d}"

    def remove_partials(self) -> None:
        """Removes snapshots that were never finished."""
        for name in self.disk.names(self.path):
            if name.startswith(".snapshot-"):
                self.disk.remove_folder(self.path / name)

    def remove_before(self, number: int) -> None:
        """Removes the snapshots and segments that a snapshot has made superfluous, the oldest first."""
        for each in self.snapshots():
            if each < number:
                self.disk.remove_folder(self.snapshot(each))
        for each in self.segments():
            if each < number:
                self.disk.remove(self.segment(each))

    def mark_closed(self, next_number: int) -> None:
        """Says that the log ends before the record `next_number`, and that all of it is synced."""
        text = f"{next_number:016x}"
        self.disk.replace(self.path / CLOSED, f"{text} {zlib.crc32(text.encode()):08x}\n".encode())

    def closed_at(self) -> int | None:
        """What `mark_closed` said last; None where the log was written since. Raises Corrupt."""
        content = self.disk.read(self.path / CLOSED)
        if content is None:
            return None
        text, _, check = content.decode("latin-1").partition(" ")
        if check != f"{zlib.crc32(text.encode('latin-1')):08x}\n" or not re.fullmatch(r"[0-9a-f]{16}", text):
            raise Corrupt(f"{self.path / CLOSED}: its checksum does not fit")
        return int(text, 16)

    def mark_open(self) -> None:
        """The log will be written."""
        self.disk.remove(self.path / CLOSED)

    @property
    def is_restored(self) -> bool:
        """Whether these are the files of a backup, which no server has opened yet."""
        return self.disk.read(self.path / RESTORED) is not None

    def mark_restored(self) -> None:
        """Says that these are the files of a backup: positions that came after it are not given again as they were."""
        self.disk.replace(self.path / RESTORED, b"restored\n")

    def forget_restored(self) -> None:
        """A server goes on from here."""
        self.disk.remove(self.path / RESTORED)

    @property
    def is_passing(self) -> bool:
        """Whether these are the files of a memory that was being dropped; see orphans.py."""
        return self.disk.read(self.path / PASSING) is not None

    def mark_passing(self) -> None:
        """Says that the memory is dropped, for a start that does not find it in the catalogue."""
        self.disk.replace(self.path / PASSING, b"passing\n")

    def forget_passing(self) -> None:
        """The memory stays."""
        self.disk.remove(self.path / PASSING)

    def _numbers(self, kind: str) -> list[int]:
        matches = (_NUMBERED.fullmatch(name) for name in self.disk.names(self.path))
        return [int(match[2]) for match in matches if match and match[1] == kind]
