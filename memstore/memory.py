"""One memory: its slab, its sequences and its index. Retrieves and appends; called by the device's thread only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from memstore import ring
from memstore.appending import stage, write
from memstore.changes import Appended, Change, Forked, Pinned, Released, Renewed
from memstore.errors import DeviceMemoryFull, MemstoreError, NotFound, ReadOnly
from memstore.index import INDEXES, build_thread, index_bytes, make_index
from memstore.journal import Volatile
from memstore.known import without_known
from memstore.ledger import Ledger, changes_of
from memstore.lender import Lender
from memstore.lifecycle import Lifecycle
from memstore.planner import Planner, on_device, plans_of
from memstore.refill import Refill
from memstore.repeated import Repeated, Source
from memstore.retrieval import retrieve
from memstore.row_bytes import RowFormat
from memstore.sequence import BatchPlan, plan_fork
from memstore.slab import Slab, bytes_needed
from memstore.still import Pictures
from memstore.tiers import host_bytes
from memstore.types import (
    NO_ROOM,
    Durability,
    Hits,
    MemoryCounts,
    MemorySpec,
    SequenceResult,
    StepBatch,
    StepResult,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as SequenceOf
    from concurrent.futures import Executor

    from memstore.appending import StagedAppend
    from memstore.journal import Keeper
    from memstore.region.base import Region
    from memstore.sequence import SequenceTable


def _nowhere(_: int, __: Hits) -> None:
    """Hits that only the result has."""


class Memory:
    """All rows of one spec on one device; `lender` lends sequences to other processes. Not thread safe."""

    def __init__(
        self,
        spec: MemorySpec,
        device: torch.device,
        *,
        new_epoch: Callable[[], int],
        builds: Executor | None = None,
        is_shared: bool = False,
        mapped: tuple[Slab, SequenceTable] | None = None,
    ) -> None:
        """Reserves everything that the memory will ever take, and touches what rows take. Raises DeviceMemoryFull.

        builds: where the index builds in the background, one thing after the other; a thread of its own if None.
        is_shared: in a region that can be lent. mapped: what another process has reserved, and those of its sequences
        that this one has the lease of; nothing is reserved then.
        """
        self.spec = spec
        self.device = device
        self.keeper: Keeper = Volatile()
        """Makes its changes last; another one may be put here before the first of them."""
        self.reserved_bytes = self.bytes_needed(spec, device, is_shared=is_shared)
        self._new_epoch = new_epoch
        self._index = make_index(spec, device, build_thread() if builds is None else builds)
        self._slab, table = mapped or (Slab(spec, device, is_shared=is_shared), None)
        self._ledger = Ledger(spec, table)
        self._table = self._ledger.table
        self.pictures = Pictures(self._slab, self._table, spec)
        self.lifecycle = Lifecycle(spec, self._slab, self._table, None if mapped else self.pictures)
        self.lender = Lender(self._slab, self._table, new_epoch, self.lifecycle)
        self._planner = Planner(spec, device, self._table, self.lender)

    @property
    def row_bytes(self) -> int:
        """Bytes of an entry in all layers, as logs and snapshots have it."""
        return RowFormat(self.spec).row_bytes

    @staticmethod
    def bytes_needed(spec: MemorySpec, device: torch.device, *, is_shared: bool = False) -> int:
        """Bytes of the device that a memory of this spec reserves: its rows, and what its index takes at most."""
        spilled = host_bytes(spec) if device.type == "cpu" else 0
        return bytes_needed(spec, device, is_shared=is_shared) + index_bytes(spec, device) + spilled

    @staticmethod
    def can_be_lent(spec: MemorySpec) -> bool:
        """True where another process can search and append: nothing is kept beside the rows, neither index nor log."""
        return spec.index in INDEXES and spec.durability is Durability.VOLATILE

    @property
    def region(self) -> Region | None:
        """What can be handed to other processes; None where nothing can."""
        return self._slab.region

    def step(
        self, batches: SequenceOf[StepBatch], carry: Callable[[int, Hits], None] = _nowhere
    ) -> list[StepResult | MemstoreError]:
        """Retrieves for all batches in one search, hands out what was found, then appends those that append.

        The batches have disjoint sequences; those that retrieve have equal options and layers. A batch that does not
        fit the state is answered by its error and changes nothing; the others are done. `carry` gets the number of a
        batch and its hits while nothing is changed yet; what it raises is that batch's error. A resend of an append is
        answered and retrieved for as at its first arrival, as far as the rows it saw are still there. Where the changes
        cannot be kept, ReadOnly answers the batches that have some. Raises DeviceMemoryFull where there is no scratch,
        and then nothing is changed at all; NotFound, as all changes do, once the memory is freed.

        Where sequences are spilled, those of a batch come back for it; see Lifecycle.step.
        """
        self.lender.check_lives()
        return (
            self.lifecycle.step(batches, carry, self._step) if self.lifecycle.is_needed else self._step(batches, carry)
        )

    def _step(
        self, batches: SequenceOf[StepBatch], carry: Callable[[int, Hits], None]
    ) -> list[StepResult | MemstoreError]:
        """See `step`; all sequences that exist have a place."""
        try:
            outcomes = self._planner.plan(batches)
            found = self._retrieve(outcomes)
            for at, hits in found.items():
                try:
                    self.lender.check_intact(plans_of([outcomes[at]]))
                    carry(at, hits)
                except MemstoreError as error:
                    outcomes[at] = error
            staged = stage(self._slab, plans_of(outcomes), self._table.places_of_new)
            if staged is not None:
                self.pictures.preserve(staged.first_cells)
        except NO_ROOM as error:
            raise DeviceMemoryFull("no working memory is left on the device; nothing was changed") from error
        changes = self._commit(outcomes, staged)
        results = [
            outcome if isinstance(outcome, MemstoreError) else self._result(outcome, found.get(at))
            for at, outcome in enumerate(outcomes)
        ]
        changed = [change.sequence for change in changes]
        if staged is not None and changes:
            self._table.announce(changed)
            write(self._slab, staged)
            if self._index.is_told:
                self._tell_appended(change.sequence for change in changes if change.num_rows)
        self._table.publish(changed)
        return results

    def repeat(self, batch: StepBatch) -> Repeated | None:
        """What retrieves for this batch again and again; None where a retrieval changes something, or must be kept."""
        if self.spec.durability is not Durability.VOLATILE or self.lifecycle.is_needed:
            return None
        check = self.lender.check_lives
        source = Source(slab=self._slab, table=self._table, index=self._index, check_lives=check)
        return Repeated.of(source, on_device(batch, self.device))

    def settle(self, answer: Callable[[ReadOnly | None], None]) -> None:
        """Calls `answer` once what was done and shown until now lasts as the memory promises; see Keeper."""
        self.keeper.settle(answer)

    def reset(self, names: SequenceOf[str], release: bool) -> list[int]:
        """Empties sequences and gives their new epochs; 0 for one that does not exist, or, with `release`, no more.

        Raises ReadOnly, NotReady where one is lent, and nothing is changed then.
        """
        for name in names:
            self.lender.check_writable(name, "")
        known = [name for name in names if self._table.get(name) is not None]
        changes: list[Change] = [
            Released(sequence=name)
            if release
            else Appended(sequence=name, new_epoch=self._new_epoch(), is_append=False)
            for name in known
        ]
        self._do(changes)
        self._table.publish(known)
        self.lifecycle.touch(known)
        if not release:
            self.lifecycle.empty(known)
        return [self._table.epoch(name) for name in names]

    def expire(self) -> int:
        """Ends some of those whose `idle_ttl_s` is over, as `reset` with `release`; their number. Raises ReadOnly."""
        return self.lifecycle.expire(lambda names: self.reset(names, release=True))

    def pin(self, names: SequenceOf[str], is_pinned: bool) -> int:
        """Keeps sequences on the device, for ever, or lets them go their ways again; how many are kept so now.

        Raises NotFound, QuotaExceeded where they cannot all have places, ReadOnly; then no pin is changed.
        """
        self.lender.check_lives()
        for name in names:
            if self._table.get(name) is None:
                raise NotFound(f"sequences: there is no sequence {name!r}")
        self.lifecycle.admit(names if is_pinned else ())
        self.lifecycle.touch(names)
        self._do([Pinned(name, is_pinned) for name in names if self._table[name].is_pinned != is_pinned])
        return self._ledger.num_pinned

    def fork(self, source: str, target: str, as_of: int | None, epoch: int) -> SequenceResult:
        """Gives a new sequence the live positions of another below `as_of`, by copying: its place is reserved anyway.

        Raises NotFound (source), AlreadyExists (target), EpochChanged, PositionExpired (beyond what is published),
        QuotaExceeded, ReadOnly, NotReady where one is lent; nothing is changed then. first_position of the result is
        the target's next position.
        """
        self.lender.check_lives()
        for name in (source, target):
            self.lender.check_writable(name, "")
        plan = plan_fork(self._table, source, target, as_of, epoch, self.spec.capacity)
        self.lifecycle.admit([source], num_new=1)
        if not self._table.num_free:
            self.lender.check_kept()
        self._table.check_room(target)
        change = Forked(source=source, target=target, epoch=self._new_epoch(), begin=plan.begin, end=plan.as_of)
        (place,) = self._table.places_of_new([target])
        self.pictures.preserve_rows(place, plan.begin, plan.num_seen)
        self._do([change])
        self.lifecycle.touch((source, target))
        return SequenceResult(epoch=change.epoch, as_of=plan.as_of, live_begin=plan.begin, first_position=plan.as_of)

    def counts(self) -> MemoryCounts:
        """What the memory holds now. appended_rows counts forked rows too: num_rows = appended_rows - evicted_rows."""
        lent_appended, lent_evicted, num_vacant = self.lender.counts()
        appended, evicted = self._ledger.appended_rows + lent_appended, self._ledger.evicted_rows + lent_evicted
        return MemoryCounts(
            num_sequences=len(self._table) - num_vacant,
            num_rows=appended - evicted,
            reserved_bytes=self.reserved_bytes,
            appended_rows=appended,
            evicted_rows=evicted,
            index=self._index.counts(),
            num_pinned=self._ledger.num_pinned,
            expired_sequences=self.lifecycle.num_expired,
            spill=self.lifecycle.counts(),
        )

    def stop_builds(self) -> None:
        """Ends the background work of the index for good; everything is scanned from now on."""
        self._index.close()

    def refill(self) -> Refill:
        """What fills it, while it is new and nobody else's, with what its files hold."""
        return Refill(self.spec, self._slab, self._ledger, self.lifecycle, self._apply)

    def wake(self) -> None:
        """After it was refilled: lets the index begin with what is here."""
        if self.device.type == "cuda":  # the other thread's copies
            torch.cuda.synchronize(self.device)
        if self._index.is_told:
            self._tell_appended(name for name, _ in self._table.items())

    def renew(self) -> None:
        """Gives every sequence a new epoch and forgets its writers, as rows behind its last one may be lost."""
        self._do([Renewed(sequence=name, epoch=self._new_epoch()) for name, _ in self._table.items()])

    def free(self) -> None:
        """Gives everything back to the device, but for what `join` waits for; the memory is of no use afterwards.

        Nor is it to those it is lent to. Files of spilled sequences stay until `remove_files`.
        """
        self.stop_builds()
        self.lender.revoke()
        self.lifecycle.free()
        self._slab.free()

    def join(self) -> None:
        """After `free`, in any thread: returns when the background work has ended, too."""
        self._index.join()

    def remove_files(self) -> None:
        """After `free`, in any thread: removes the files of spilled sequences, which may take long."""
        self.lifecycle.remove_files()

    def _retrieve(self, outcomes: SequenceOf[BatchPlan | MemstoreError]) -> dict[int, Hits]:
        """The hits of those that retrieve, by their number."""
        asking = {
            at: plan
            for at, plan in enumerate(outcomes)
            if isinstance(plan, BatchPlan) and plan.batch.retrieve is not None
        }
        found = retrieve(self._slab, self._index, list(asking.values()))
        return {at: without_known(plan, hits) for (at, plan), hits in zip(asking.items(), found, strict=True)}

    def _commit(self, outcomes: list[BatchPlan | MemstoreError], staged: StagedAppend | None) -> list[Appended]:
        """Keeps and does the changes of all batches, and gives them.

        Where they cannot be kept, the batches that have some get the error, and none is done or given.
        """
        changes = {
            at: changes_of(plan, self._new_epoch) for at, plan in enumerate(outcomes) if isinstance(plan, BatchPlan)
        }
        every = [change for each in changes.values() for change in each]
        if every:
            try:
                self.keeper.write(every, None if staged is None else staged.rows)
            except ReadOnly as error:
                for at in (at for at, each in changes.items() if each):
                    outcomes[at] = error
                return []
        for change in every:
            if change.new_epoch:
                self._tell_forgotten(change)
            self._ledger.do(change)
        return every

    def _do(self, changes: SequenceOf[Change]) -> None:
        """Keeps changes without rows, then does them. Raises ReadOnly, and nothing is changed then."""
        self.lender.check_lives()
        if changes:
            self.keeper.write(changes, None)
        for change in changes:
            self._tell_forgotten(change)
            self._apply(change)
            if isinstance(change, Forked):
                source, target = self._table[change.source].place, self._table[change.target].place
                self._index.forked(self._slab, source, target, change.begin, change.end)

    def _tell_forgotten(self, change: Change) -> None:
        """Tells the index of a sequence that is about to end, or to begin anew."""
        if isinstance(change, Appended | Released):
            sequence = self._table.get(change.sequence)
            if sequence is not None:
                self._index.forgotten(sequence.place)

    def _tell_appended(self, names: Iterable[str]) -> None:
        """Tells the index which sequences have new rows."""
        for name in names:
            sequence = self._table[name]
            begin = sequence.begin(self.spec.capacity)
            self._index.appended(self._slab, sequence.place, begin, sequence.next_position)

    def _apply(self, change: Change) -> None:
        """Does one change, with the copies that a fork makes."""
        if isinstance(change, Released):
            self.lifecycle.forget(change.sequence)
        self._ledger.do(change)
        if isinstance(change, Forked):
            source, target = self._table[change.source].place, self._table[change.target].place
            for run in ring.runs(change.begin, change.end, self.spec.capacity):
                self._slab.copy_place(source, target, run.slot, run.length)

    def _result(self, plan: BatchPlan, hits: Hits | None) -> StepResult:
        append, epoch = plan.batch.append, self._table.epoch
        sequences = [
            SequenceResult(
                epoch(part.part.sequence),
                part.as_of,
                part.begin,
                part.first_position,
                part.part.num_rows if append else 0,
                part.is_replay,
            )
            for part in plan.parts
        ]
        return StepResult(sequences=tuple(sequences), hits=hits)
