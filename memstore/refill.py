"""Refill: fills a memory that is new with what its files hold: a snapshot, then the changes of the log behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.appending import cells_of
from memstore.changes import Appended
from memstore.errors import Corrupt
from memstore.places import Places
from memstore.row_bytes import RowFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from memstore.changes import Change
    from memstore.ledger import Ledger
    from memstore.lifecycle import Lifecycle
    from memstore.sequence import Sequence as Stream
    from memstore.slab import Slab
    from memstore.types import MemorySpec


class Refill:
    """Used by one thread, before anybody has the memory."""

    def __init__(
        self,
        spec: MemorySpec,
        slab: Slab,
        ledger: Ledger,
        lifecycle: Lifecycle,
        apply: Callable[[Change], None],
    ) -> None:
        """apply: does a change, with the copies that belong to it."""
        self._spec = spec
        self._slab = slab
        self._ledger = ledger
        self._lifecycle = lifecycle
        self._apply = apply

    def restore(self, sequences: Mapping[str, Stream], appended_rows: int, evicted_rows: int) -> None:
        """Takes over the sequences of a snapshot; their rows are given to `put`. ValueError where they do not fit."""
        self._ledger.restore(sequences, appended_rows, evicted_rows)
        self._lifecycle.restore(sequences)

    def put(self, place: int, position: int, num_rows: int, content: memoryview) -> None:
        """Puts rows of a snapshot in their place, as they were: `num_rows` from `position` on, as RowFormat has them.

        Raises Corrupt where they have another length, or are of no sequence; OSError where they have to be spilled, and
        the disk fails.
        """
        if Places.of(self._spec).is_on_device(place):
            self._put([(place, position, num_rows)], content)
            return
        if self._lifecycle.spill is None:
            raise Corrupt("rows of a place that the memory does not have")
        slots = cells_of([(0, position, num_rows)], self._spec.capacity)
        rows = self._format(num_rows, content).decode(content, num_rows)
        self._lifecycle.spill.arrivals.put(place, position + num_rows, rows, slots)

    def check_whole(self) -> None:
        """After the last `put`. Raises Corrupt where rows are missing."""
        if self._lifecycle.spill is not None:
            self._lifecycle.spill.arrivals.check_whole()

    def redo(self, changes: Sequence[Change], content: memoryview) -> None:
        """Does changes of a log once more, and puts the rows they appended. Raises as Lifecycle.admit_changes."""
        self._lifecycle.admit_changes(changes)
        kept = []
        for change in changes:
            self._ledger.check(change)
            self._apply(change)
            if isinstance(change, Appended) and change.num_rows:
                count = min(change.num_rows, self._spec.capacity)
                sequence = self._ledger.table[change.sequence]
                kept.append((sequence.place, sequence.next_position - count, count))
        self._put(kept, content)
        self._lifecycle.touch_changed(changes)

    def _put(self, kept: Sequence[tuple[int, int, int]], content: memoryview) -> None:
        """kept: (place, first position, rows) of each sequence, in order."""
        num_rows = sum(count for _, _, count in kept)
        rows = self._format(num_rows, content)
        if num_rows:
            device = self._slab.device
            cells = cells_of(kept, self._spec.capacity).to(device)
            self._slab.write(rows.decode(content, num_rows).to(device), self._slab.in_all_layers(cells))

    def _format(self, num_rows: int, content: memoryview) -> RowFormat:
        """The format of rows that have the right length. Raises Corrupt."""
        rows = RowFormat(self._spec)
        if len(content) != num_rows * rows.row_bytes:
            raise Corrupt(f"{len(content)} bytes of rows, {num_rows * rows.row_bytes} expected")
        return rows
