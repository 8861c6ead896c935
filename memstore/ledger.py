"""Ledger: the sequences of one memory and what it counts, and the one place where a change is done to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.changes import Appended, Change, Forked, Pinned, Released, Renewed
from memstore.errors import Corrupt
from memstore.sequence import Reply, Sequence, SequenceTable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from memstore.sequence import BatchPlan, PartPlan
    from memstore.types import MemorySpec, StepBatch


class Ledger:
    """All of a memory's state but its rows. Rows are counted over all layers."""

    def __init__(self, spec: MemorySpec, table: SequenceTable | None = None) -> None:
        """table: of sequences that another process has lent; a table of this process's own if None."""
        self.table = SequenceTable(spec.max_sequences, spec.spill.max_sequences) if table is None else table
        self.appended_rows = 0
        self.evicted_rows = 0
        self.num_pinned = 0
        self._spec = spec

    def do(self, change: Change) -> None:
        """Does one change. Cannot fail where it was planned against this state."""
        match change:
            case Appended():
                sequence = self.table.get(change.sequence)
                if change.new_epoch:
                    sequence = self._begin(change.sequence, change.new_epoch, sequence)
                if change.is_append and sequence is not None:
                    self._advance(sequence, change)
            case Released():
                sequence = self.table[change.sequence]
                self._forget_rows(sequence)
                self.num_pinned -= sequence.is_pinned
                self.table.remove(change.sequence)
            case Forked():
                sequence = self.table.create(change.target, change.epoch)
                sequence.next_position, sequence.floor = change.end, change.begin
                self.appended_rows += (change.end - change.begin) * self._spec.num_layers
            case Renewed():
                sequence = self.table[change.sequence]
                sequence.epoch = change.epoch
                sequence.writers.clear()
            case Pinned():
                sequence = self.table[change.sequence]
                self.num_pinned += change.is_pinned - sequence.is_pinned
                sequence.is_pinned = change.is_pinned

    def check(self, change: Change) -> None:
        """Raises Corrupt where a change of a log does not fit this state."""
        match change:
            case Appended():
                sequence = self.table.get(change.sequence)
                goes_on = sequence is not None and not change.new_epoch
                fits = (sequence is not None or change.new_epoch != 0) and (sequence or self.table.num_free)
                if not fits or (change.is_append and change.first_position != _next(sequence if goes_on else None)):
                    raise Corrupt(f"the log appends to sequence {change.sequence!r} where it did not end")
            case Forked():
                source = self.table.get(change.source)
                is_free = self.table.get(change.target) is None and self.table.num_free
                begin = None if source is None else source.begin(self._spec.capacity)
                if source is None or begin is None or not is_free:
                    raise Corrupt(f"the log forks sequence {change.source!r}, which cannot be")
                if not min(begin, change.end) <= change.begin <= change.end <= source.next_position:
                    raise Corrupt(f"the log forks sequence {change.source!r} beyond what it holds")
            case Released() | Renewed() | Pinned():
                if self.table.get(change.sequence) is None:
                    raise Corrupt(f"the log names sequence {change.sequence!r}, which does not exist")

    def restore(self, sequences: Mapping[str, Sequence], appended_rows: int, evicted_rows: int) -> None:
        """Takes over the state of a snapshot; nothing may be here yet. ValueError where two share a place."""
        for name, sequence in sequences.items():
            self.table.restore(name, sequence)
        self.appended_rows, self.evicted_rows = appended_rows, evicted_rows
        self.num_pinned = sum(sequence.is_pinned for sequence in sequences.values())

    def _begin(self, name: str, epoch: int, sequence: Sequence | None) -> Sequence:
        """A sequence that begins, or begins anew."""
        if sequence is None:
            return self.table.create(name, epoch)
        self._forget_rows(sequence)
        sequence.restart(epoch)
        return sequence

    def _advance(self, sequence: Sequence, change: Appended) -> None:
        """Counts the rows of an append as published, and its answer as given."""
        capacity, num_layers, num_rows = self._spec.capacity, self._spec.num_layers, change.num_rows
        begin = sequence.begin(capacity)
        sequence.next_position += num_rows
        sequence.num_appended += num_rows
        self.appended_rows += num_rows * num_layers
        if sequence.next_position > capacity:  # or none can have left
            self.evicted_rows += (sequence.begin(capacity) - begin) * num_layers
        if change.reply is not None:
            sequence.remember(change.writer, change.reply)

    def _forget_rows(self, sequence: Sequence) -> None:
        self.evicted_rows += sequence.num_live(self._spec.capacity) * self._spec.num_layers


def changes_of(plan: BatchPlan, new_epoch: Callable[[], int]) -> list[Appended]:
    """What a batch will change, with the epochs of what it begins."""
    if not plan.batch.append and not any(part.part.start_of_sequence for part in plan.parts):
        return []
    changes = [_change(plan.batch, part, new_epoch) for part in plan.parts]
    return [change for change in changes if change is not None]


def _change(batch: StepBatch, plan: PartPlan, new_epoch: Callable[[], int]) -> Appended | None:
    part, is_new = plan.part, plan.sequence is None
    if plan.is_replay or not (batch.append or (part.start_of_sequence and not is_new)):
        return None
    epoch = new_epoch() if is_new or part.start_of_sequence else 0
    if not batch.append:
        return Appended(part.sequence, epoch, is_append=False)
    reply = None
    if batch.writer:
        begun_from = part.epoch if part.start_of_sequence else None
        reply = Reply(part.num_rows, plan.fingerprint, plan.as_of, plan.first_position, begun_from)
    return Appended(part.sequence, epoch, True, part.num_rows, plan.first_position, batch.writer, reply)


def _next(sequence: Sequence | None) -> int:
    return 0 if sequence is None else sequence.next_position
