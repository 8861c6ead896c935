"""Seating: which sequences have a place on the device, and who leaves it for whom.

A call can be planned once each sequence that it names, and that exists, has a place, and as many places are free as it
will bring sequences into being. Batches that are run together need that all at once. So while a group of them grows,

    what they name stays                                            Group.names
    so many of the free places are spoken for, and given to nobody  Group.num_new

and each batch that is admitted beside a group finds this true, and leaves it true of the group with itself. Where there
is no room beside a group, the batch is tried again alone once the group has run; before that no lease is asked back.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from memstore.errors import Corrupt, MemstoreError, NotReady, QuotaExceeded
from memstore.lease import RECALL_S

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from memstore.seams import Clock
    from memstore.sequence import SequenceTable
    from memstore.spill import Spill
    from memstore.types import MemorySpec


@dataclass(slots=True)
class Group:
    """Batches that will be run together, by their numbers: the sequences that they name, and how many they begin."""

    numbers: list[int] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    num_new: int = 0

    def add(self, number: int, names: Sequence[str], num_new: int) -> None:
        """One more of them, which was admitted beside the others."""
        self.numbers.append(number)
        self.names.update(names)
        self.num_new += num_new


class Seating:
    """See above. Called by the device's thread, and before it by whoever fills the memory.

    used: when each that has a place was used, monotonic seconds; the least recently used one first. has_damage: whether
    a spilled file has failed since somebody made this False.
    """

    def __init__(self, spec: MemorySpec, table: SequenceTable, spill: Spill | None) -> None:
        """spill: None where nobody ever leaves."""
        self.used: OrderedDict[str, float] = OrderedDict()
        self.has_damage = False
        self._spec = spec
        self._table = table
        self._spill = spill

    def admit(self, names: Sequence[str], num_new: int, beside: Group, clock: Clock) -> None:
        """Gives a place to each of these that exists, and sees to a free one for each of so many new sequences.

        Where the memory can have no more sequences, no place is made for new ones: the plan will say so. Raises
        QuotaExceeded, NotReady where lent ones have the places (one is asked back) or a file cannot be read, Corrupt,
        DeviceMemoryFull, OSError where a file cannot be written; who has a place may have changed then.
        """
        spill = self._spill
        if spill is None:
            return
        if len(self._table) + beside.num_new + num_new > self._spec.total_sequences:
            num_new = 0
        if sum(name in self._table for name in names) + num_new > self._spec.max_sequences:
            raise QuotaExceeded(f"sequences: a call has places for {self._spec.max_sequences} at once")
        stay, asks_back = beside.names | set(names), not beside.numbers
        for name in names:
            if name in spill.away:
                self._bring_back(spill, name, stay, beside.num_new, asks_back=asks_back)
                self.used[name] = clock.monotonic()
        while num_new and self._table.num_free_places < beside.num_new + num_new:
            self._make_room(spill, stay, None, asks_back=asks_back)

    def may_leave(self, name: str) -> bool:
        """Whether a sequence may be spilled, or ended for being idle."""
        sequence = self._table[name]
        return not sequence.is_pinned and sequence.loan is None

    def _bring_back(
        self, spill: Spill, name: str, stay: AbstractSet[str], num_spoken_for: int, *, asks_back: bool
    ) -> None:
        """Gives one that is away a place. Where that fails, whoever left for it comes back, as far as it can."""
        left, used_at = None, 0.0
        if self._table.num_free_places <= num_spoken_for:
            left, used_at = self._make_room(spill, stay, name, asks_back=asks_back)
        try:
            spill.come_back(name)
        except (MemstoreError, OSError) as error:
            self.has_damage |= isinstance(error, Corrupt)
            if left is not None:  # else one more than has room would be away
                spill.come_back(left)
                self.used[left] = used_at
                self.used.move_to_end(left, last=False)
            raise

    def _make_room(
        self, spill: Spill, stay: AbstractSet[str], returning: str | None, *, asks_back: bool
    ) -> tuple[str, float]:
        """Spills the least recently used sequence that may leave; its name, and when it was used.

        stay: who may not. returning: see Spill.leave. asks_back: a lease is asked back where only that makes room.
        Raises QuotaExceeded, NotReady, OSError; nothing is changed then.
        """
        name = next((name for name in self.used if name not in stay and self.may_leave(name)), None)
        if name is None:
            raise self._nobody_leaves(stay, asks_back=asks_back)
        spill.leave(name, self.used[name], returning)
        return name, self.used.pop(name)

    def _nobody_leaves(self, stay: AbstractSet[str], *, asks_back: bool) -> MemstoreError:
        """Why that is. The lease that was used least recently, but for those of who stays, is asked back."""
        lent = [name for name in self.used if name not in stay and self._table.loan(name) is not None]
        loan = self._table.loan(lent[0]) if asks_back and lent else None
        if loan is not None:
            loan.lease.ask_back()
            return NotReady("sequences: lent ones have all places, and were asked back", RECALL_S)
        num_pinned = sum(self._table[name].is_pinned for name in self.used)
        return QuotaExceeded(
            f"sequences: a call has places for {self._spec.max_sequences} at once, and {num_pinned} of them are pinned"
        )
