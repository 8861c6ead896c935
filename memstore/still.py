"""Still: the rows of a memory as they were at one moment, taken out piece by piece while the memory goes on.

Before a row that is still to be taken is overwritten, it is put aside, once. So the picture costs the device thread one
piece at a time, and beside that no more than a copy of what is overwritten meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from memstore import ring
from memstore.appending import cells_of
from memstore.errors import Corrupt
from memstore.places import Places
from memstore.row_bytes import RowFormat
from memstore.sequence import Sequence, Writer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memstore.sequence import SequenceTable
    from memstore.slab import Slab, StagedRows
    from memstore.tiers import Tiers
    from memstore.types import MemorySpec

PIECE_BYTES = 1 << 20
"""What is taken at once, at least one entry: less than a millisecond of the device thread."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Slots [slot, slot + length) of one place, which hold the positions from `position` on."""

    place: int
    position: int
    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class _Aside:
    """Rows that were overwritten before they were taken. cells: (n,) place * capacity + slot."""

    cells: torch.Tensor
    rows: StagedRows


class Rescue(Protocol):
    """Sequences that are to be had from elsewhere. Every call raises Corrupt and OSError."""

    def sequence(self, name: str) -> Sequence:
        """Its counters and writers; its place says nothing."""

    def fill(self, name: str, slab: Slab) -> None:
        """Puts its live rows into place 0 of a slab of the host's."""


class Still:
    """A memory at one moment. But for `sequences`, `pieces` and what is filed, it belongs to the device's thread.

    rescued: filed sequences that are taken from elsewhere, as their files cannot be read.
    """

    def __init__(self, slab: Slab, table: SequenceTable, spec: MemorySpec, tiers: Tiers | None = None) -> None:
        """tiers: where sequences lie that have no place in the slab; frozen for as long as this is used."""
        self.sequences: dict[str, Sequence] = {name: copy_of(sequence) for name, sequence in table.items()}
        self.format = RowFormat(spec)
        self._slab = slab
        self._tiers = tiers
        self._read: tuple[int, Slab] | None = None
        self.rescued: dict[str, Rescue] = {}
        self._places = Places.of(spec)
        self._capacity = spec.capacity
        length = max(1, PIECE_BYTES // self.format.row_bytes)
        self.pieces = [piece for each in self.sequences.values() for piece in _pieces(each, spec.capacity, length)]
        self._waiting = torch.zeros(spec.max_sequences * spec.capacity, dtype=torch.bool)
        self._aside: dict[int, list[_Aside]] = {}
        self._names = {sequence.place: name for name, sequence in self.sequences.items()}
        for piece in self.pieces:
            if self._places.is_on_device(piece.place):
                self._cells(piece).fill_(True)

    def preserve(self, cells: torch.Tensor) -> None:
        """Puts aside rows that are about to be overwritten. cells: (n,) int64 of layer 0. May run out of memory."""
        on_host = cells.cpu()
        hit = on_host[self._waiting[on_host]]
        if not len(hit):
            return
        aside = _Aside(hit, self._slab.rows(hit.to(self._slab.device)).to("cpu"))
        self._waiting[hit] = False
        for place in np.unique(hit.numpy() // self._capacity).tolist():
            self._aside.setdefault(place, []).append(aside)

    def take(self, piece: Piece) -> list[memoryview]:
        """The bytes of a piece, as RowFormat has them; a copy."""
        if self._tiers is not None and not self._places.is_on_device(piece.place):
            return self._take_beyond(self._tiers, piece)
        begin = piece.place * self._capacity + piece.slot
        cells = torch.arange(begin, begin + piece.length)
        rows = self._slab.rows(cells.to(self._slab.device)).to("cpu")
        for aside in self._aside.get(piece.place, ()):
            inside = (aside.cells >= begin) & (aside.cells < begin + piece.length)
            rows.put(aside.cells[inside] - begin, aside.rows.select(inside))
        self._cells(piece).fill_(False)
        return self.format.encode(rows)

    def is_filed(self, piece: Piece) -> bool:
        """Whether a piece is read from a file, and can be taken in any thread, one after another."""
        return self._tiers is not None and self._places.is_filed(piece.place)

    def name_of(self, piece: Piece) -> str:
        """Whose piece it is."""
        return self._names[piece.place]

    def whole(self, name: str, sequence: Sequence) -> Sequence:
        """A sequence of this picture with its writers, which may have to be read. Raises Corrupt, NotReady, OSError."""
        if self._tiers is None or not self._places.is_filed(sequence.place):
            return sequence
        rescue = self.rescued.get(name)
        writers = self._tiers.writers_of(name, sequence) if rescue is None else rescue.sequence(name).writers
        return replace(sequence, writers=writers)

    def rescue(self, name: str, rescue: Rescue) -> None:
        """Takes a filed sequence from there. Raises Corrupt where that is another time's, OSError."""
        ours, theirs = self.sequences[name], rescue.sequence(name)
        if (ours.epoch, ours.next_position, ours.floor) != (theirs.epoch, theirs.next_position, theirs.floor):
            raise Corrupt(f"sequences[{name!r}]: the log has another state of it")
        self.rescued[name] = rescue
        self._read = None

    def _take_beyond(self, tiers: Tiers, piece: Piece) -> list[memoryview]:
        """The same of a piece that lies beyond the slab."""
        slots = torch.arange(piece.slot, piece.slot + piece.length)
        if not self._places.is_filed(piece.place):
            return self.format.encode(tiers.rows(piece.place, slots))
        place, scratch = self._read or (-1, tiers.scratch())
        if place != piece.place:
            self._read = None
            self._fill(tiers, self._names[piece.place], scratch)
            self._read = piece.place, scratch
        return self.format.encode(scratch.rows(slots))

    def _fill(self, tiers: Tiers, name: str, scratch: Slab) -> None:
        """Reads all rows of a filed sequence. What its file says of its writers is read later, but checked now."""
        if name in self.rescued:
            self.rescued[name].fill(name, scratch)
        else:
            tiers.read_rows(name, self.sequences[name], scratch, 0)
            tiers.writers_of(name, self.sequences[name])

    def _cells(self, piece: Piece) -> torch.Tensor:
        begin = piece.place * self._capacity + piece.slot
        return self._waiting[begin : begin + piece.length]


class Pictures:
    """The picture of a memory that is being taken, if one is: one at a time. Called by the device's thread."""

    def __init__(self, slab: Slab, table: SequenceTable, spec: MemorySpec) -> None:
        self.tiers: Tiers | None = None
        """Where the sequences lie that have no place in the slab."""
        self._slab = slab
        self._table = table
        self._spec = spec
        self._still: Still | None = None

    def hold(self) -> Still:
        """A picture of this moment; `let_go` ends it."""
        self._still = Still(self._slab, self._table, self._spec, self.tiers)
        if self.tiers is not None:
            self.tiers.freeze(sequence.place for sequence in self._table)
        return self._still

    def let_go(self) -> None:
        """Nothing is put aside for a picture any more."""
        self._still = None
        if self.tiers is not None:
            self.tiers.thaw()

    def preserve(self, cells: NDArray[np.int64]) -> None:
        """Lets the picture put aside what is about to be overwritten. cells: of layer 0. May run out of memory."""
        if self._still is not None:
            self._still.preserve(torch.from_numpy(cells))

    def preserve_rows(self, place: int, position: int, num_rows: int) -> None:
        """The same for the cells of rows that follow one another in one place."""
        if self._still is not None:
            self._still.preserve(cells_of([(place, position, num_rows)], self._spec.capacity))


def copy_of(sequence: Sequence) -> Sequence:
    """The same sequence, which nobody changes. Replies are values, and shared."""
    writers = OrderedDict(
        (name, Writer(writer.next_seq, writer.replies.copy())) for name, writer in sequence.writers.items()
    )
    counters = sequence.place, sequence.epoch, sequence.next_position, sequence.floor
    return Sequence(*counters, writers, sequence.is_pinned, sequence.num_appended, sequence.loan)


def _pieces(sequence: Sequence, capacity: int, length: int) -> list[Piece]:
    """The live rows of a sequence, oldest first."""
    return [
        Piece(sequence.place, run.position + at, run.slot + at, min(length, run.length - at))
        for run in ring.runs(sequence.begin(capacity), sequence.next_position, capacity)
        for at in range(0, run.length, length)
    ]
