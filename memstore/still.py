"""Still: the rows of a memory as they were at one moment, taken out piece by piece while the memory goes on.

Before a row that is still to be taken is overwritten, it is put aside, once. So the picture costs the device thread one
piece at a time, and beside that no more than a copy of what is overwritten meanwhile.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore import ring
from memstore.row_bytes import RowFormat

if TYPE_CHECKING:
    from memstore.sequence import Sequence, SequenceTable
    from memstore.slab import Slab, StagedRows
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


class Still:
    """A memory at one moment. Everything but `sequences` and `pieces` belongs to the device's thread."""

    def __init__(self, slab: Slab, table: SequenceTable, spec: MemorySpec) -> None:
        self.sequences: dict[str, Sequence] = {name: copy_of(sequence) for name, sequence in table.items()}
        self.format = RowFormat(spec)
        self._slab = slab
        self._capacity = spec.capacity
        length = max(1, PIECE_BYTES // self.format.row_bytes)
        self.pieces = [piece for each in self.sequences.values() for piece in _pieces(each, spec.capacity, length)]
        self._waiting = torch.zeros(spec.max_sequences * spec.capacity, dtype=torch.bool)
        self._aside: dict[int, list[_Aside]] = {}
        for piece in self.pieces:
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
        begin = piece.place * self._capacity + piece.slot
        cells = torch.arange(begin, begin + piece.length)
        rows = self._slab.rows(cells.to(self._slab.device)).to("cpu")
        for aside in self._aside.get(piece.place, ()):
            inside = (aside.cells >= begin) & (aside.cells < begin + piece.length)
            rows.put(aside.cells[inside] - begin, aside.rows.select(inside))
        self._cells(piece).fill_(False)
        return self.format.encode(rows)

    def _cells(self, piece: Piece) -> torch.Tensor:
        begin = piece.place * self._capacity + piece.slot
        return self._waiting[begin : begin + piece.length]


def copy_of(sequence: Sequence) -> Sequence:
    """The same sequence, which nobody changes. Replies are values, and shared."""
    twin = copy.copy(sequence)
    twin.writers = copy.copy(sequence.writers)
    for name, writer in sequence.writers.items():
        twin.writers[name] = copy.copy(writer)
        twin.writers[name].replies = copy.copy(writer.replies)
    return twin


def _pieces(sequence: Sequence, capacity: int, length: int) -> list[Piece]:
    """The live rows of a sequence, oldest first."""
    return [
        Piece(sequence.place, run.position + at, run.slot + at, min(length, run.length - at))
        for run in ring.runs(sequence.begin(capacity), sequence.next_position, capacity)
        for at in range(0, run.length, length)
    ]
