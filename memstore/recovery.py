"""Recovery: a memory as its folder has it: the newest good snapshot, and the log behind it done once more."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memstore.errors import Corrupt
from memstore.journal import read_step
from memstore.log import STEP, Head, SegmentReader, read_head
from memstore.logs import trouble
from memstore.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from memstore.folder import MemoryFolder
    from memstore.log import Record
    from memstore.memory import Memory

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """How a memory was found. cut_bytes: of a record that was being written when everything stopped.

    is_loss_possible: the machine went down while the log was open, so that what was not synced may be gone.
    """

    next_number: int
    next_segment: int
    num_steps: int
    log_bytes: int
    cut_bytes: int
    is_loss_possible: bool


@dataclass(slots=True)
class _Segment:
    """One segment as far as it could be read."""

    number: int
    head: Head | None
    end: int
    size: int
    next_number: int
    num_steps: int

    def is_behind_loss(self, boot_id: str) -> bool:
        """Whether what was acknowledged may be gone and no new epochs were given since, where this is the last one."""
        if self.head is None or self.head.boot_id != boot_id:
            return True
        return self.head.is_behind_loss and self.num_steps == 0

    @property
    def is_torn(self) -> bool:
        """Whether it ends before its file does, or has not even a head."""
        return self.end < self.size or self.head is None


class Recovery:
    """Brings one memory back. The memory is new, and nobody else has it yet."""

    def __init__(self, folder: MemoryFolder, identity: str, progress: Callable[[int, int], None]) -> None:
        """progress: is told how many bytes are read, of how many."""
        self._folder = folder
        self._identity = identity
        self._progress = progress
        self._num_steps = 0
        self._done_bytes = self._total_bytes = 0

    def run(self, memory: Memory) -> Recovered:
        """Fills the memory. Raises Corrupt and OSError; then files are as they were, and the memory is of no use."""
        folder = self._folder
        snapshot, first = self._newest()
        sizes = {number: self._size(number) for number in folder.segments() if number >= first}
        numbers = [number for number in sizes if sizes[number] or number == first]  # an empty one was not begun
        if numbers != list(range(first, first + len(numbers))) or not numbers:
            raise Corrupt(f"{folder.path}: segments {numbers} of the log are here, not all from {first} on")
        self._total_bytes = (0 if snapshot is None else snapshot.num_bytes) + sum(sizes.values())
        next_number = 1
        if snapshot is not None:
            self._load(snapshot, memory)
            next_number = snapshot.number
        read = self._replay_all(numbers, next_number, memory)
        next_number = read[-1].next_number
        closed_at = folder.closed_at()
        if closed_at is not None and closed_at != next_number:
            raise Corrupt(f"{folder.path}: the log ends before record {next_number}, and was closed at {closed_at}")
        next_segment = self._tidy(read, list(sizes), first)
        last = next(segment for segment in reversed(read) if segment.head is not None)
        return Recovered(
            next_number=next_number,
            next_segment=next_segment,
            num_steps=self._num_steps,
            log_bytes=sum(segment.end for segment in read),
            cut_bytes=sum(sizes.values()) - sum(segment.end for segment in read),
            is_loss_possible=closed_at is None and last.is_behind_loss(folder.disk.boot_id()),
        )

    def _newest(self) -> tuple[Snapshot | None, int]:
        """The newest snapshot, and the first segment behind it. An older one where the newest is bad, and says so."""
        numbers = self._folder.snapshots()
        for number in reversed(numbers):
            try:
                snapshot = Snapshot(self._folder.disk, self._folder.snapshot(number))
                if len(numbers) > 1:  # the log behind an older one is still there
                    snapshot.verify()
            except Corrupt as error:
                if number == numbers[0]:
                    raise
                trouble(_log, "snapshot is damaged, taking the one before", error, folder=str(self._folder.path))
                continue
            return snapshot, number
        return None, 1

    def _load(self, snapshot: Snapshot, memory: Memory) -> None:
        if snapshot.identity != self._identity:
            raise Corrupt(f"{self._folder.path}: its snapshot is that of another memory")
        state = snapshot.state(memory.spec)
        try:
            memory.restore(state.sequences, state.appended_rows, state.evicted_rows)
            for chunk, content in snapshot.rows(memory.row_bytes):
                place = state.sequences[chunk.sequence].place
                memory.put([(place, chunk.position, chunk.num_rows)], content)
                self._advance(len(content))
        except (ValueError, KeyError) as error:
            raise Corrupt(f"{self._folder.path}: its snapshot contradicts itself: {error}") from error

    def _replay_all(self, numbers: Sequence[int], next_number: int, memory: Memory) -> list[_Segment]:
        """Does what the segments say, up to the torn end of one; those behind it were never acknowledged."""
        read: list[_Segment] = []
        for at, number in enumerate(numbers):
            head = read[-1].head if read else None
            read.append(self._replay(number, next_number, memory, head, numbers[at + 1 :]))
            next_number = read[-1].next_number
            if read[-1].is_torn:
                break
        return read

    def _replay(
        self, number: int, next_number: int, memory: Memory, before: Head | None, later: Sequence[int]
    ) -> _Segment:
        """Does what a segment says. Raises Corrupt where it is bad and that is no torn end."""
        path = self._folder.segment(number)
        file = self._folder.disk.open(path)
        reader, head, num_steps = SegmentReader(file), None, 0
        try:
            for record in reader.records(next_number):
                if head is None:
                    head = self._head(record, path)
                elif record.kind == STEP:
                    memory.redo(*read_step(record.body))
                    num_steps += 1
                else:
                    raise Corrupt(f"{path}: a record of kind {record.kind} where a step should be")
                next_number = record.number + 1
                self._advance(len(record.body))
            segment = _Segment(number, head, reader.end, file.size, next_number, num_steps)
            self._num_steps += num_steps
            if segment.is_torn:
                self._check_torn(reader, segment, head or before, later)
            return segment
        finally:
            file.close()

    def _head(self, record: Record, path: Path) -> Head:
        head = read_head(record, str(path))
        if head.identity != self._identity:
            raise Corrupt(f"{path}: a log of another memory")
        return head

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

    def _tidy(self, read: Sequence[_Segment], numbers: Sequence[int], first: int) -> int:
        """Cuts the torn end, syncs what is kept, and removes what is superfluous; the number of the next segment."""
        folder, next_segment = self._folder, read[-1].number + (read[-1].head is not None)
        for number in numbers:
            if number >= next_segment:
                folder.disk.remove(folder.segment(number))
        for segment in read:
            if segment.head is not None:  # what a killed process wrote may not be synced
                folder.disk.truncate(folder.segment(segment.number), segment.end)
        folder.remove_partials()
        folder.remove_before(first)
        return next_segment

    def _size(self, number: int) -> int:
        file = self._folder.disk.open(self._folder.segment(number))
        file.close()
        return file.size

    def _advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        self._progress(self._done_bytes, self._total_bytes)
