"""Salvage: some sequences of a memory out of its log and the snapshot before, where their spilled files fail.

What lies in a spilled file is in log and snapshot too: only these make rows last. So the next snapshot takes a sequence
from there whose file fails its check. The log is read for all sequences in question, and those they were forked from;
it says where their live rows stand, and these are read then, one sequence after the other.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from memstore.appending import cells_of
from memstore.changes import Appended, Forked, Released
from memstore.errors import Corrupt
from memstore.journal import read_step
from memstore.ledger import Ledger
from memstore.log import STEP, SegmentReader, read_head
from memstore.row_bytes import RowFormat
from memstore.sequence import SequenceTable
from memstore.snapshot import ROWS, newest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from memstore.changes import Change
    from memstore.folder import MemoryFolder
    from memstore.log import Record
    from memstore.sequence import Sequence as Stream
    from memstore.slab import Slab, StagedRows
    from memstore.snapshot import Snapshot
    from memstore.types import MemorySpec


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows that stand together in a file: those of a record, or a chunk of a snapshot, which has its CRC-32 elsewhere.

    offset: of the record, header included, or of the chunk.
    """

    path: Path
    offset: int
    num_rows: int
    crc: int | None = None


@dataclass(frozen=True, slots=True)
class _Extent:
    """The rows of positions [position, position + num_rows) of a sequence: from row `first` of a block on."""

    position: int
    num_rows: int
    block: _Block
    first: int = 0

    @property
    def end(self) -> int:
        return self.position + self.num_rows

    def within(self, begin: int, end: int) -> _Extent:
        """The part of it that lies in [begin, end); of no rows where there is none."""
        begin, end = max(begin, self.position), min(end, self.end)
        return replace(self, position=begin, num_rows=max(end - begin, 0), first=self.first + begin - self.position)


class Salvage:
    """Sequences as they were where a segment of the log begins. Every call raises Corrupt and OSError."""

    def __init__(self, folder: MemoryFolder, spec: MemorySpec, segment: int, names: Iterable[str]) -> None:
        """names: of those that are asked for. Reads the log from the newest snapshot on up to this segment.

        Once; or twice where some were forked from others, which the first reading tells.
        """
        self._folder = folder
        self._spec = spec
        self._format = RowFormat(spec)
        self._segment = segment
        self._sources: dict[str, set[str]] = {}
        """What each sequence was forked from, whoever had its name."""
        self._follow(frozenset(names))
        if self._is_lacking:
            self._follow(self._with_sources(self._followed))

    def sequence(self, name: str) -> Stream:
        """Its counters and writers; its place says nothing."""
        try:
            return self._table[name]
        except KeyError as error:
            raise Corrupt(f"sequences[{name!r}]: the log does not have it") from error

    def fill(self, name: str, slab: Slab) -> None:
        """Puts its live rows into place 0 of a slab of the host's."""
        sequence, capacity = self.sequence(name), self._spec.capacity
        position = sequence.begin(capacity)
        for extent in self._extents[name]:
            extent = extent.within(position, sequence.next_position)
            if extent.num_rows and extent.position == position:
                cells = cells_of([(0, position, extent.num_rows)], capacity)
                slab.write(self._rows(extent), slab.in_all_layers(cells))
                position = extent.end
        if position != sequence.next_position:
            raise Corrupt(f"sequences[{name!r}]: the log lacks rows of it")

    def _with_sources(self, names: Iterable[str]) -> frozenset[str]:
        """These, and all that they may have rows of."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self._sources.get(name, ())
        return frozenset(found)

    def _follow(self, names: frozenset[str]) -> None:
        """Follows sequences through snapshot and log: their state, and where their rows stand."""
        total = self._spec.total_sequences
        self._followed = names
        self._is_lacking = False  # one of them was forked from one that is not
        self._table = SequenceTable(total, total)
        self._ledger = Ledger(self._spec, self._table)
        self._extents: dict[str, deque[_Extent]] = {}
        snapshot, first = newest(self._folder, before=self._segment)
        next_number = 1 if snapshot is None else self._follow_snapshot(snapshot, self._folder.snapshot(first))
        for number in range(first, self._segment):
            next_number = self._follow_segment(number, next_number)

    def _follow_snapshot(self, snapshot: Snapshot, path: Path) -> int:
        """Begins with a snapshot; the number of the first record behind it."""
        sequences = snapshot.state(self._spec).sequences
        followed = {name: sequence for name, sequence in sequences.items() if name in self._followed}
        self._ledger.restore(followed, 0, 0)
        self._extents = {name: deque() for name in followed}
        offsets = accumulate((chunk.num_rows * self._format.row_bytes for chunk in snapshot.chunks), initial=0)
        for chunk, offset in zip(snapshot.chunks, offsets, strict=False):
            if chunk.sequence in followed:
                block = _Block(path / ROWS, offset, chunk.num_rows, chunk.crc)
                self._extents[chunk.sequence].append(_Extent(chunk.position, chunk.num_rows, block))
        return snapshot.number

    def _follow_segment(self, number: int, next_number: int) -> int:
        """Goes on with a segment; the number of the first record behind it."""
        path = self._folder.segment(number)
        file = self._folder.disk.open(path)
        try:
            reader, offset = SegmentReader(file), 0
            for record in reader.records(next_number):
                if offset == 0:
                    read_head(record, str(path))
                else:
                    self._follow_record(record, path, offset)
                next_number, offset = record.number + 1, reader.end
            if reader.end != file.size:
                raise Corrupt(f"{path}: record {next_number} at byte {reader.end} fails its check")
        finally:
            file.close()
        return next_number

    def _follow_record(self, record: Record, path: Path, offset: int) -> None:
        changes, _ = read_step(record.body)
        counts = [
            min(change.num_rows, self._spec.capacity) if isinstance(change, Appended) else 0 for change in changes
        ]
        block, first = _Block(path, offset, sum(counts)), 0
        for change, count in zip(changes, counts, strict=True):
            name = change.target if isinstance(change, Forked) else change.sequence
            if isinstance(change, Forked):
                self._sources.setdefault(name, set()).add(change.source)
                self._is_lacking |= name in self._followed and change.source not in self._followed
            if name in self._followed and not self._is_lacking:
                self._follow_change(name, change, _Extent(0, count, block, first))
            first += count

    def _follow_change(self, name: str, change: Change, appended: _Extent) -> None:
        """appended: the rows of the change in its record, whose positions are still to be said."""
        self._ledger.check(change)
        self._ledger.do(change)
        match change:
            case Forked():
                cut = (extent.within(change.begin, change.end) for extent in self._extents[change.source])
                self._extents[name] = deque(extent for extent in cut if extent.num_rows)
            case Released():
                del self._extents[name]
            case Appended():
                extents, sequence = self._extents.setdefault(name, deque()), self._table[name]
                if change.new_epoch:
                    extents.clear()
                if appended.num_rows:
                    extents.append(replace(appended, position=sequence.next_position - appended.num_rows))
                while extents and extents[0].end <= sequence.begin(self._spec.capacity):
                    extents.popleft()

    def _rows(self, extent: _Extent) -> StagedRows:
        """Reads the rows of an extent."""
        block = extent.block
        file = self._folder.disk.open(block.path)
        try:
            if block.crc is None:
                record = SegmentReader(file).record_at(block.offset)
                content = None if record is None or record.kind != STEP else read_step(record.body)[1]
            else:
                content = memoryview(bytearray(block.num_rows * self._format.row_bytes))
                if file.read_into(block.offset, content) < len(content) or zlib.crc32(content) != block.crc:
                    content = None
        finally:
            file.close()
        if content is None or len(content) != block.num_rows * self._format.row_bytes:
            raise Corrupt(f"{block.path}: what stands at byte {block.offset} fails its check")
        return self._format.decode(content, block.num_rows).only(extent.first, extent.first + extent.num_rows)
