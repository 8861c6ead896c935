"""Recovery: a memory as its folder has it: the newest good snapshot, and the log behind it done once more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from memstore.errors import Corrupt
from memstore.journal import read_step
from memstore.log import STEP, Head, SegmentReader, read_head
from memstore.snapshot import newest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from memstore.changes import Change
    from memstore.folder import MemoryFolder
    from memstore.log import Record
    from memstore.memory import Memory
    from memstore.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """How a memory was found. cut_bytes: of a record that was being written when everything stopped.

    is_loss_possible: the machine went down while the log was open, so that what was not synced may be gone.
    is_restored: these are files of a backup, and what came after it was made is gone.
    """

    first_segment: int
    next_number: int
    next_segment: int
    num_changes: int
    log_bytes: int
    cut_bytes: int
    is_loss_possible: bool
    is_restored: bool


@dataclass(slots=True)
class _Segment:
    """One segment as far as it could be read."""

    number: int
    head: Head | None
    end: int
    size: int
    next_number: int
    num_changes: int

    def is_behind_loss(self, boot_id: str) -> bool:
        """Whether what was acknowledged may be gone and no new epochs were given since, where this is the last one."""
        if self.head is None or self.head.boot_id != boot_id:
            return True
        return self.head.is_behind_loss and self.num_changes == 0

    @property
    def is_torn(self) -> bool:
        """Whether it ends before its file does, or has not even a head."""
        return self.end < self.size or self.head is None


class Target(Protocol):
    """What a memory's files are read into."""

    def load(self, snapshot: Snapshot) -> None:
        """Takes over a snapshot, and checks all of it. Raises Corrupt, NotReady, OSError."""

    def redo(self, changes: Sequence[Change], content: memoryview) -> None:
        """Does changes once more, with the bytes of their rows. Raises Corrupt, NotReady, OSError."""


class Filling:
    """Fills a memory."""

    def __init__(self, memory: Memory, advance: Callable[[int], None]) -> None:
        self._memory = memory
        self._refill = memory.refill()
        self._advance = advance
        self.redo = self._refill.redo

    def load(self, snapshot: Snapshot) -> None:
        memory, state = self._memory, snapshot.state(self._memory.spec)
        try:
            self._refill.restore(state.sequences, state.appended_rows, state.evicted_rows)
            for chunk, content in snapshot.rows(memory.row_bytes):
                place = state.sequences[chunk.sequence].place
                self._refill.put(place, chunk.position, chunk.num_rows, content)
                self._advance(len(content))
            self._refill.check_whole()
        except (ValueError, KeyError) as error:
            raise Corrupt(f"the snapshot contradicts itself: {error}") from error


class Checking:
    """Checks what can be checked without a memory."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def load(self, snapshot: Snapshot) -> None:
        snapshot.verify()
        self._advance(snapshot.num_bytes)

    def redo(self, changes: Sequence[Change], content: memoryview) -> None:
        """The record is whole, and has been read."""


class Recovery:
    """Brings one memory back. The memory is new, and nobody else has it yet."""

    def __init__(self, folder: MemoryFolder, identity: str, progress: Callable[[int, int], None]) -> None:
        """identity: of the memory; "" for whatever there is. progress: is told how many bytes are read, of how many."""
        self._folder = folder
        self.identity = identity
        self._progress = progress
        self._num_changes = 0
        self._done_bytes = self._total_bytes = 0

    def run(self, memory: Memory) -> Recovered:
        """Fills the memory.

        Raises Corrupt where files are damaged, OSError and NotReady where the disk fails now; then the files are as
        they were, and the memory is of no use.
        """
        read, found = self._read(Filling(memory, self._advance))
        self._tidy(read, found)
        return found

    def check(self) -> Recovered:
        """Reads and checks all that `run` would, and changes nothing. Raises Corrupt and OSError."""
        _, found = self._read(Checking(self._advance))
        return found

    def _read(self, target: Target) -> tuple[list[_Segment], Recovered]:
        """Reads the newest snapshot and the log behind it into a target."""
        folder = self._folder
        snapshot, first = newest(folder)
        sizes = {number: self._size(number) for number in folder.segments() if number >= first}
        numbers = [number for number in sizes if sizes[number] or number == first]  # an empty one was not begun
        if numbers != list(range(first, first + len(numbers))) or not numbers:
            raise Corrupt(f"{folder.path}: segments {numbers} of the log are here, not all from {first} on")
        self._total_bytes = (0 if snapshot is None else snapshot.num_bytes) + sum(sizes.values())
        if snapshot is not None:
            self._check_identity(snapshot.identity, str(folder.path))
            target.load(snapshot)
        read = self._replay_all(numbers, 1 if snapshot is None else snapshot.number, target)
        return read, self._found(read, first, sum(sizes.values()))

    def _found(self, read: Sequence[_Segment], first: int, size: int) -> Recovered:
        folder, next_number = self._folder, read[-1].next_number
        closed_at = folder.closed_at()
        if closed_at is not None and closed_at != next_number:
            raise Corrupt(f"{folder.path}: the log ends before record {next_number}, and was closed at {closed_at}")
        last = next(segment for segment in reversed(read) if segment.head is not None)
        kept_bytes = sum(segment.end for segment in read)
        return Recovered(
            first_segment=first,
            next_number=next_number,
            next_segment=last.number + 1,
            num_changes=self._num_changes,
            log_bytes=kept_bytes,
            cut_bytes=size - kept_bytes,
            is_loss_possible=closed_at is None and last.is_behind_loss(folder.disk.boot_id()),
            is_restored=folder.is_restored,
        )

    def _replay_all(self, numbers: Sequence[int], next_number: int, target: Target) -> list[_Segment]:
        """Does what the segments say, up to the torn end of one; those behind it were never acknowledged."""
        read: list[_Segment] = []
        for at, number in enumerate(numbers):
            head = read[-1].head if read else None
            read.append(self._replay(number, next_number, target, head, numbers[at + 1 :]))
            next_number = read[-1].next_number
            if read[-1].is_torn:
                break
        return read

    def _replay(
        self, number: int, next_number: int, target: Target, before: Head | None, later: Sequence[int]
    ) -> _Segment:
        """Does what a segment says. Raises Corrupt where it is bad and that is no torn end."""
        path = self._folder.segment(number)
        file = self._folder.disk.open(path)
        reader, head, num_changes = SegmentReader(file), None, 0
        try:
            for record in reader.records(next_number):
                if head is None:
                    head = self._head(record, path)
                elif record.kind == STEP:
                    changes, rows = read_step(record.body)
                    target.redo(changes, rows)
                    num_changes += len(changes)
                else:
                    raise Corrupt(f"{path}: a record of kind {record.kind} where a step should be")
                next_number = record.number + 1
                self._advance(len(record.body))
            segment = _Segment(number, head, reader.end, file.size, next_number, num_changes)
            self._num_changes += num_changes
            if segment.is_torn:
                self._check_torn(reader, segment, head or before, later)
            return segment
        finally:
            file.close()

    def _head(self, record: Record, path: Path) -> Head:
        head = read_head(record, str(path))
        self._check_identity(head.identity, str(path))
        return head

    def _check_identity(self, identity: str, where: str) -> None:
        """Raises Corrupt where a file belongs to another memory; without one given, the first file says which."""
        self.identity = self.identity or identity
        if identity != self.identity:
            raise Corrupt(f"{where}: the files of another memory")

    def _check_torn(
        self, reader: SegmentReader, segment: _Segment, written_in: Head | None, later: Sequence[int]
    ) -> None:
        """Raises Corrupt unless the log may end as this segment does."""
        path = self._folder.segment(segment.number)
        problem = f"{path}: record {segment.next_number} at byte {segment.end} fails its check"
        if written_in is None:
            raise Corrupt(problem)
        if written_in.boot_id == self._folder.disk.boot_id():
            is_torn = reader.is_cut_short and not later
        else:
            synced = max(reader.synced_behind(), *map(self._synced, later), 0)
            is_torn = synced <= segment.next_number
        if not is_torn:
            raise Corrupt(problem)

    def _synced(self, number: int) -> int:
        """The largest record number that anything in a segment says was synced."""
        file = self._folder.disk.open(self._folder.segment(number))
        try:
            return SegmentReader(file).synced_behind()
        finally:
            file.close()

    def _tidy(self, read: Sequence[_Segment], found: Recovered) -> None:
        """Cuts the torn end, syncs what is kept, and removes what is superfluous."""
        folder = self._folder
        for number in folder.segments():
            if number >= found.next_segment:
                folder.disk.remove(folder.segment(number))
        for segment in read:
            if segment.head is not None:  # what a killed process wrote may not be synced
                folder.disk.truncate(folder.segment(segment.number), segment.end)
        folder.remove_partials()
        folder.remove_before(found.first_segment)

    def _size(self, number: int) -> int:
        file = self._folder.disk.open(self._folder.segment(number))
        file.close()
        return file.size

    def _advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        self._progress(self._done_bytes, self._total_bytes)
