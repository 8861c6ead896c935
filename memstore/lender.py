"""Lender: lends sequences of one memory to other processes, takes them back, and finds those of a dead server again."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memstore import ring
from memstore.control import ControlBlock
from memstore.errors import Corrupt, DeviceMemoryFull, NotFound, NotReady, QuotaExceeded
from memstore.lease import RECALL_S, Lease, Loan
from memstore.sequence import MAX_WRITERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from memstore.lifecycle import Lifecycle
    from memstore.sequence import BatchPlan, SequenceTable, Writer
    from memstore.sequence import Sequence as Stream
    from memstore.slab import Slab


@dataclass(frozen=True, slots=True, kw_only=True)
class LentState:
    """The whole state of a sequence when it is lent, given back or found again."""

    name: str
    place: int
    epoch: int
    next_position: int
    floor: int
    writers: OrderedDict[str, Writer]


class Lender:
    """The leases of one memory. Called by the device's thread only.

    appended_rows, evicted_rows: of leases that have ended, in all layers.
    """

    def __init__(
        self,
        slab: Slab,
        table: SequenceTable,
        new_epoch: Callable[[], int],
        lifecycle: Lifecycle | None = None,
    ) -> None:
        """lifecycle: where sequences come and go by themselves; what is lent stays."""
        self.appended_rows = 0
        self.evicted_rows = 0
        self._slab = slab
        self._table = table
        self._new_epoch = new_epoch
        self._lifecycle = lifecycle
        self._leases: set[Lease] = set()
        self._is_over = False

    def __len__(self) -> int:
        """Leases that live."""
        return len(self._leases)

    def __contains__(self, lease: Lease) -> bool:
        """True while a lease lives."""
        return lease in self._leases

    def lend(
        self, names: Sequence[str], writer: str, recall: Callable[[int], None], on_end: Callable[[], None]
    ) -> Lease:
        """A lease of these sequences; those that do not exist have a place kept. See Lease for the rest.

        Raises NotReady where one is lent already, NotFound where the memory was dropped, QuotaExceeded,
        DeviceMemoryFull; nothing is changed then.
        """
        self.check_lives()
        if any(self._table.loan(name) is not None for name in names):
            raise NotReady("sequences: one of them is lent to another process")
        known = [self._table.get(name) for name in names]
        num_new = known.count(None)
        if self._lifecycle is not None:
            self._lifecycle.admit(names, num_new)
        if num_new > self._table.num_free:
            raise QuotaExceeded(f"sequences: {num_new} new ones, but there is room for {self._table.num_free}")
        self._wait()
        number = secrets.randbits(63) or 1
        try:
            block = ControlBlock.make(number, len(names))
        except OSError as error:
            raise DeviceMemoryFull("no memory for a control block") from error
        lease = Lease(number=number, writer=writer, names=tuple(names), block=block, recall=recall, on_end=on_end)
        table = block.table()
        for index, (name, sequence) in enumerate(zip(names, known, strict=True)):
            stream = sequence or self._table.create(name, 0)  # a place, until its holder appends
            stream.loan = Loan(lease, index, stream.epoch, stream.num_live(self._slab.capacity))
            table[index] = stream.epoch, stream.next_position, stream.floor, 0
        block.publish(table)
        self._leases.add(lease)
        self._touch(names)
        return lease

    def states(self, lease: Lease) -> list[LentState]:
        """The sequences of a lease that was just made, and what is to be known of its writer's appends."""
        return [state_of(name, self._table[name], (lease.writer,)) for name in lease.names]

    def take_back(self, lease: Lease, states: Iterable[LentState] = ()) -> None:
        """Ends a lease: the sequences are the server's again, with what is published.

        states: what its holder left when it gave the lease back, none where it died.
        """
        self._leases.remove(lease)
        lease.block.end()
        left = {state.name: state for state in states}
        for name in lease.names:
            sequence = self._table[name]
            if sequence.loan is not None:
                self._settle(name, sequence, sequence.loan, left.get(name))
        lease.block.close()
        self._touch(lease.names)
        lease.on_end()

    def revoke(self) -> None:
        """Ends all leases, for ever; their sequences are of no use any more."""
        self._is_over = True
        for lease in self._leases:
            lease.block.end()
            for name in lease.names:
                self._table[name].loan = None
            lease.block.close()
            lease.on_end()
        self._leases.clear()

    def check_lives(self) -> None:
        """NotFound where the memory was dropped, after the caller had found it: nothing of it may be touched."""
        if self._is_over:
            raise NotFound("the memory was dropped")

    def check_writable(self, name: str, writer: str) -> None:
        """NotReady for a sequence that is lent; it is recalled unless its own holder asks, who knows better."""
        loan = self._table.loan(name) if self._leases else None
        if loan is not None:
            if writer != loan.lease.writer:
                loan.lease.ask_back()
            raise NotReady(f"sequences[{name!r}]: lent to another process, which was asked for it", RECALL_S)

    def check_kept(self) -> None:
        """NotReady where leases keep places that nothing lies in; they are recalled."""
        keeping = [lease for lease in self._leases if any(map(self._is_vacant, lease.names))]
        for lease in keeping:
            lease.ask_back()
        if keeping:
            raise NotReady("sequences: places are kept for other processes, which were asked for them", RECALL_S)

    def _is_vacant(self, name: str) -> bool:
        """Whether nothing of use lies in the place that is kept for it; so where its holder has written nonsense."""
        try:
            return self._table.get(name) is None
        except Corrupt:
            return True

    def check_intact(self, plans: Iterable[BatchPlan]) -> None:
        """NotReady where the holder of a lease has written over rows while they were read for these plans."""
        if not self._leases:
            return
        for part in (part for plan in plans for part in plan.parts):
            sequence = part.sequence
            if sequence is None or sequence.loan is None or part.begin == part.as_of:
                continue
            self._wait()
            epoch = sequence.epoch
            sequence.refresh()
            if sequence.epoch != epoch or sequence.begin(self._slab.capacity) > part.begin:
                raise NotReady(f"sequences[{part.part.sequence!r}]: its holder was writing; read it again", RECALL_S)

    def _wait(self) -> None:
        """Until a GPU has done what this thread has asked of it: other processes cannot wait for that."""
        if self._slab.device.type == "cuda":
            torch.cuda.current_stream(self._slab.device).synchronize()

    def counts(self) -> tuple[int, int, int]:
        """Rows appended and evicted under all leases, in all layers; and places that are only kept."""
        appended, evicted, num_vacant = self.appended_rows, self.evicted_rows, 0
        for sequence in (self._table[name] for lease in self._leases for name in lease.names):
            if sequence.loan is not None:
                added, left = self._counted(sequence, sequence.loan)
                appended, evicted = appended + added, evicted + left
                num_vacant += sequence.epoch == 0
        return appended, evicted, num_vacant

    def restore(self, old: Slab, states: Iterable[LentState]) -> int:
        """Copies sequences out of the slab of a server that has gone; gives their number.

        Left out are those that have begun anew meanwhile, and those that there is no room for; others are spilled for
        them, where that can be.
        """
        num_found = 0
        for state in states:
            if not state.epoch or state.name in self._table or not self._has_room():
                continue
            sequence = self._table.create(state.name, state.epoch)
            sequence.next_position, sequence.floor = state.next_position, state.floor
            sequence.writers = state.writers
            begin = sequence.begin(self._slab.capacity)
            for run in ring.runs(begin, sequence.next_position, self._slab.capacity):
                self._slab.copy_place(state.place, sequence.place, run.slot, run.length, old)
            self.appended_rows += sequence.num_live(self._slab.capacity) * self._slab.num_layers
            self._touch((state.name,))
            num_found += 1
        return num_found

    def _has_room(self) -> bool:
        """Whether one more sequence can begin to exist, after another one has left for it if need be."""
        if self._lifecycle is not None:
            with suppress(QuotaExceeded, NotReady):
                self._lifecycle.admit((), num_new=1)
        return self._table.num_free > 0

    def _counted(self, sequence: Stream, loan: Loan) -> tuple[int, int]:
        """See _moved. Of a holder that has written what cannot be, all that it was lent; its lease is recalled."""
        try:
            sequence.refresh()
            return self._moved(sequence, loan)
        except Corrupt:
            loan.lease.ask_back()
            return 0, loan.num_live * self._slab.num_layers

    def _touch(self, names: Iterable[str]) -> None:
        if self._lifecycle is not None:
            self._lifecycle.touch(names)

    def _settle(self, name: str, sequence: Stream, loan: Loan, left: LentState | None) -> None:
        try:
            sequence.refresh()
            added, gone = self._moved(sequence, loan)
        except Corrupt:
            self.evicted_rows += loan.num_live * self._slab.num_layers
            sequence.loan = None
            sequence.restart(self._new_epoch())
            return
        self.appended_rows += added
        self.evicted_rows += gone
        sequence.loan = None
        if not sequence.epoch:
            self._table.remove(name)
            return
        if sequence.epoch != loan.epoch:
            sequence.writers.clear()
        is_last = left is not None and (left.epoch, left.next_position) == (sequence.epoch, sequence.next_position)
        for writer, appends in left.writers.items() if left is not None and is_last else ():
            sequence.writers[writer] = appends
            sequence.writers.move_to_end(writer)
        while len(sequence.writers) > MAX_WRITERS:
            sequence.writers.popitem(last=False)

    def _moved(self, sequence: Stream, loan: Loan) -> tuple[int, int]:
        """Rows that a sequence has gained and lost since it was lent, in all layers."""
        appended = loan.progress().num_appended
        evicted = max(appended + loan.num_live - sequence.num_live(self._slab.capacity), 0)
        return appended * self._slab.num_layers, evicted * self._slab.num_layers


def state_of(name: str, sequence: Stream, writers: Iterable[str]) -> LentState:
    """A sequence as it is, with those of these writers that it knows."""
    known = OrderedDict((each, sequence.writers[each]) for each in writers if each in sequence.writers)
    return LentState(
        name=name,
        place=sequence.place,
        epoch=sequence.epoch,
        next_position=sequence.next_position,
        floor=sequence.floor,
        writers=known,
    )
