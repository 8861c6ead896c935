"""Lifecycle: the sequences of a memory that is used: their places, the order in which they were used, and their end.

A sequence that is used has a place on the device (seating.py); where none is free, the least recently used one that may
leave is spilled (spill.py). What was not used for `idle_ttl_s` ends, as by a reset with `release`, unless it is pinned
or lent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.changes import Appended, Forked, Pinned
from memstore.errors import Corrupt, MemstoreError, NotReady, QuotaExceeded
from memstore.places import Places
from memstore.seams import SystemClock
from memstore.seating import Group, Seating
from memstore.spill import Spill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from memstore.changes import Change
    from memstore.seams import Clock
    from memstore.sequence import Sequence as Stream
    from memstore.sequence import SequenceTable
    from memstore.slab import Slab
    from memstore.still import Pictures
    from memstore.types import Hits, MemorySpec, SpillCounts, StepBatch, StepResult

    Carry = Callable[[int, Hits], None]
    Run = Callable[[Sequence[StepBatch], Carry], list[StepResult | MemstoreError]]

MAX_EXPIRED = 4096
"""Sequences that end for being idle in one change of the log."""


class Lifecycle:
    """See above. Called by the device's thread, and before it by whoever fills the memory.

    is_needed: False where nothing leaves by itself; then nothing is kept, and `step` can be left out. clock: may be
    another one before anything is used. spill: None where nothing is spilled.
    """

    def __init__(self, spec: MemorySpec, slab: Slab, table: SequenceTable, pictures: Pictures | None) -> None:
        """pictures: None where the slab is another process's, and nothing leaves by itself.

        Raises DeviceMemoryFull where the host has no room.
        """
        self.clock: Clock = SystemClock()
        self.is_needed = pictures is not None and bool(spec.spill.max_sequences or spec.idle_ttl_s)
        self.spill = Spill(spec, slab, table, pictures) if pictures is not None and spec.spill.max_sequences else None
        self.num_expired = 0
        self.seating = Seating(spec, table, self.spill)
        self._used = self.seating.used
        self._spec = spec
        self._table = table

    def step(self, batches: Sequence[StepBatch], carry: Carry, run: Run) -> list[StepResult | MemstoreError]:
        """`run` for all batches: at once where all their sequences have places, else for as many as can have together.

        A batch that cannot have its places is answered by its error, and changes nothing.
        """
        if self._touch_parts(batches):
            return run(batches, carry)
        if self.spill is None:
            results = run(batches, carry)
            self._touch_new(batches)
            return results
        return self._share(batches, carry, run)

    def admit(self, names: Sequence[str], num_new: int = 0, beside: Group | None = None) -> None:
        """Sees to the places that a call needs; see Seating.admit. beside: that will be run with it.

        Raises QuotaExceeded, NotReady, Corrupt, DeviceMemoryFull; who has a place may have changed then.
        """
        try:
            self.seating.admit(names, num_new, beside or Group(), self.clock)
        except OSError as error:
            raise QuotaExceeded(
                f"sequences: no place is free, and none can be spilled: the disk cannot be written ({error.strerror})"
            ) from error

    def admit_changes(self, changes: Sequence[Change]) -> None:
        """`admit` for changes of a log that are about to be done once more.

        Raises Corrupt where they do not fit; NotReady and OSError where it is the disk, now, that is in the way.
        """
        known: list[str] = []
        new: set[str] = set()
        for change in changes:
            match change:
                case Appended(sequence=name, is_append=True) | Forked(target=name):
                    (known.append if name in self._table else new.add)(name)
                case Pinned(sequence=name, is_pinned=True):
                    known.append(name)
            if isinstance(change, Forked):
                known.append(change.source)
        try:
            self.seating.admit(known, len(new), Group(), self.clock)
        except QuotaExceeded as error:
            raise Corrupt(f"the log cannot be done once more: {error}") from error
        except Corrupt as error:  # that of a file which this process has spilled, and nothing that lasts
            raise NotReady(f"the log could not be done once more: {error.message}") from error

    def touch_changed(self, changes: Sequence[Change]) -> None:
        """`touch`, and `empty`, for the sequences of changes of a log that were done."""
        self.empty([change.sequence for change in changes if isinstance(change, Appended) and not change.is_append])
        self.touch(change.target if isinstance(change, Forked) else change.sequence for change in changes)

    def touch(self, names: Iterable[str]) -> None:
        """Takes note that these were used at this moment, have come to be, or have ceased to."""
        if not self.is_needed:
            return
        now = self.clock.monotonic()
        for name in names:
            if self.spill is not None and name in self.spill.away:
                self.spill.away[name] = now
                self.spill.away.move_to_end(name)
            elif name in self._table:
                self._used[name] = now
                self._used.move_to_end(name)
            else:
                self._used.pop(name, None)

    def empty(self, names: Iterable[str]) -> None:
        """These were reset, and exist."""
        if self.spill is not None:
            for name in names:
                self.spill.empty(name)

    def forget(self, name: str) -> None:
        """A sequence is about to end."""
        if self._used.pop(name, None) is None and self.spill is not None:
            self.spill.forget(name)

    def expire(self, end: Callable[[list[str]], object]) -> int:
        """Has sequences ended whose time is over, MAX_EXPIRED at most; their number. Raises what `end` raises."""
        names = self._expired()
        if names:
            end(names)
            self.num_expired += len(names)
        return len(names)

    def _expired(self) -> list[str]:
        """Sequences that were not used for `idle_ttl_s` and may end, MAX_EXPIRED at most.

        One that is away behind one that was emptied where it is, and so later, is found once that one's time is over.
        """
        names: list[str] = []
        if not self._spec.idle_ttl_s:
            return names
        last = self.clock.monotonic() - self._spec.idle_ttl_s
        for used in (self._used,) if self.spill is None else (self.spill.away, self._used):
            for name, at in used.items():
                if at > last or len(names) == MAX_EXPIRED:
                    break
                if self.seating.may_leave(name):
                    names.append(name)
        return names

    def restore(self, sequences: Mapping[str, Stream]) -> None:
        """Takes note of the sequences of a snapshot. ValueError where they do not fit."""
        if self.spill is not None:
            self.spill.restore(sequences, self.clock.monotonic())
        places = Places.of(self._spec)
        self.touch(name for name, each in sequences.items() if places.is_on_device(each.place))

    def mend(self, name: str, found: Stream, scratch: Slab) -> None:
        """Gives a sequence a new file whose own cannot be read, if nobody has changed it since.

        found: as it was then, with its writers. scratch: in host memory, with its rows. Raises QuotaExceeded; nothing
        is changed then.
        """
        if self.spill is not None:
            self.spill.mend(name, found, scratch)

    def counts(self) -> SpillCounts | None:
        """Where sequences lie; None where nothing is spilled."""
        return None if self.spill is None else self.spill.counts()

    def free(self) -> None:
        """Gives back what lies in memory beyond the slab."""
        if self.spill is not None:
            self.spill.tiers.free()

    def remove_files(self) -> None:
        """After `free`, in any thread: removes the files of those that are away."""
        if self.spill is not None:
            self.spill.tiers.remove_files()

    def _touch_parts(self, batches: Sequence[StepBatch]) -> bool:
        """Notes that the sequences of these batches are used now; whether all of them have places."""
        now, used, has_all = self.clock.monotonic(), self._used, True
        for batch in batches:
            for part in batch.parts:
                if part.sequence in used:
                    used[part.sequence] = now
                    used.move_to_end(part.sequence)
                else:
                    has_all = False
        return has_all

    def _touch_new(self, batches: Sequence[StepBatch]) -> None:
        self.touch(part.sequence for batch in batches for part in batch.parts if part.sequence not in self._used)

    def _share(self, batches: Sequence[StepBatch], carry: Carry, run: Run) -> list[StepResult | MemstoreError]:
        """Runs as many batches at a time as can have their places together, in order.

        One for which there is no room beside those before it is tried again alone, when they have run.
        """
        results: dict[int, StepResult | MemstoreError] = {}
        group = Group()
        for at, batch in enumerate(batches):
            try:
                try:
                    self._join(group, at, batch)
                except QuotaExceeded:
                    if not group.numbers:
                        raise
                    results |= self._run_group(group, batches, carry, run)
                    group = Group()
                    self._join(group, at, batch)
            except MemstoreError as error:
                results[at] = error
        results |= self._run_group(group, batches, carry, run)
        return [results[at] for at in range(len(batches))]

    def _join(self, group: Group, at: int, batch: StepBatch) -> None:
        """Adds a batch to a group, with places for all of it. Raises what `admit` does; it is not added then."""
        names = [part.sequence for part in batch.parts]
        num_new = sum(name not in self._table for name in names) if batch.append else 0
        self.admit(names, num_new, group)
        group.add(at, names, num_new)

    def _run_group(
        self, group: Group, batches: Sequence[StepBatch], carry: Carry, run: Run
    ) -> dict[int, StepResult | MemstoreError]:
        """Runs the batches of a group; what came of each, by its number."""
        numbers = group.numbers
        if not numbers:
            return {}
        chosen = [batches[at] for at in numbers]
        try:
            done = run(chosen, lambda at, hits: carry(numbers[at], hits))
        except MemstoreError as error:  # those of groups before are done
            done = [error] * len(numbers)
        self._touch_new(chosen)  # they may have to leave for those of groups to come
        return dict(zip(numbers, done, strict=True))
