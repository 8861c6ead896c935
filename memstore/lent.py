"""LentTable: the sequences of a lease in the process that holds it; tells the server how far they are written."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from memstore.sequence import Sequence, SequenceTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from collections.abc import Sequence as SequenceOf

    from memstore.control import ControlBlock

Row = tuple[int, int, int, int]
"""Epoch, next position, floor, rows appended: of one sequence, as the control block has it."""
_ROW = struct.Struct("=4q")


class LentTable(SequenceTable):
    """See SequenceTable. Only the sequences of the lease can begin to exist here, each in its place; none ends."""

    def __init__(
        self, sequences: Mapping[str, Sequence], capacity: int, block: ControlBlock, on_written: Callable[[], None]
    ) -> None:
        """sequences: in the order of the block, those of epoch 0 do not exist. on_written: has `settle` called once
        the device has written.
        """
        super().__init__(0)
        self._lent = dict(sequences)
        self._by_name.update((name, sequence) for name, sequence in sequences.items() if sequence.epoch)
        self._numbered = {name: (index, sequence) for index, (name, sequence) in enumerate(sequences.items())}
        self._capacity = capacity
        self._block = block
        self._on_written = on_written
        self._table = block.table()
        self._bytes = self._table.data.cast("B")
        self._published: list[Row] = [tuple(row) for row in self._table.tolist()]
        self._written: dict[int, Row] = {}

    def lent(self) -> Iterable[tuple[str, Sequence]]:
        """All sequences of the lease with their names, in the order of the block."""
        return self._lent.items()

    @property
    def num_free(self) -> int:
        """Sequences of the lease that do not exist."""
        return len(self._lent) - len(self)

    def places_of_new(self, names: SequenceOf[str]) -> Iterator[int]:
        """Those that the lease has for them."""
        return iter([self._lent[name].place for name in names])

    def create(self, name: str, epoch: int) -> Sequence:
        """A sequence of the lease, in its place."""
        sequence = self._by_name[name] = self._lent[name]
        sequence.restart(epoch)
        return sequence

    def announce(self, names: SequenceOf[str]) -> None:
        """Takes out of what is published the rows that are about to be overwritten."""
        capacity, published, shrunk = self._capacity, self._published, dict[int, Row]()
        for index, sequence in self._lent_of(names):
            epoch, end, floor, num_appended = published[index]
            begin = sequence.begin(capacity)
            if epoch != sequence.epoch:
                shrunk[index] = sequence.epoch, 0, begin, num_appended
            elif begin > floor and begin > end - capacity:
                shrunk[index] = epoch, end, begin, num_appended
        self._put(shrunk)

    def publish(self, names: SequenceOf[str]) -> None:
        """Takes note of what is published as soon as the device has written it."""
        for index, sequence in self._lent_of(names):
            self._written[index] = sequence.epoch, sequence.next_position, sequence.floor, sequence.num_appended
        if names:
            self._on_written()

    def settle(self) -> None:
        """Publishes all that was written, now that the device has done it."""
        written, self._written = self._written, {}
        self._put(written)

    def _put(self, rows: Mapping[int, Row]) -> None:
        """Publishes these rows of the table, beside the others."""
        if rows:
            for index, row in rows.items():
                self._published[index] = row
                _ROW.pack_into(self._bytes, index * _ROW.size, *row)
            self._block.publish(self._table)

    def _lent_of(self, names: SequenceOf[str]) -> list[tuple[int, Sequence]]:
        return [self._numbered[name] for name in names]
