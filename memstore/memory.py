"""One memory: its slab, its sequences and its index. Retrieves and appends; called by the device's thread only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from memstore import ring
from memstore.appending import stage
from memstore.errors import AlreadyExists, DeviceMemoryFull, MemstoreError, NotFound, QuotaExceeded
from memstore.index import build_thread, index_bytes, make_index
from memstore.retrieval import retrieve
from memstore.sequence import BatchPlan, PartPlan, Reply, Sequence, SequenceTable, plan_part
from memstore.slab import Slab, bytes_needed
from memstore.types import Hits, MemoryCounts, MemorySpec, SequencePart, SequenceResult, StepBatch, StepResult

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf
    from concurrent.futures import Executor


def _nowhere(_: int, __: Hits) -> None:
    """Hits that only the result has."""


class Memory:
    """All rows of one spec on one device. Not thread safe."""

    def __init__(
        self, spec: MemorySpec, device: torch.device, *, new_epoch: Callable[[], int], builds: Executor | None = None
    ) -> None:
        """Reserves everything that the memory will ever take, and touches what rows take. Raises DeviceMemoryFull.

        builds: where the index builds in the background, one thing after the other; a thread of its own if None.
        """
        self.spec = spec
        self.device = device
        self.reserved_bytes = self.bytes_needed(spec, device)
        self._new_epoch = new_epoch
        self._index = make_index(spec, device, build_thread() if builds is None else builds)
        self._slab = Slab(spec, device)
        self._table = SequenceTable(spec.max_sequences)
        self._appended_rows = 0
        self._evicted_rows = 0

    @staticmethod
    def bytes_needed(spec: MemorySpec, device: torch.device) -> int:
        """Bytes that a memory of this spec reserves: its rows, and what its index takes at most."""
        return bytes_needed(spec) + index_bytes(spec, device)

    def step(
        self, batches: SequenceOf[StepBatch], carry: Callable[[int, Hits], None] = _nowhere
    ) -> list[StepResult | MemstoreError]:
        """Retrieves for all batches in one search, hands out what was found, then appends those that append.

        The batches have disjoint sequences; those that retrieve have equal options and layers. A batch that does not
        fit the state is answered by its error and changes nothing; the others are done. `carry` gets the number of a
        batch and its hits while nothing is changed yet; what it raises is that batch's error. A resend of an append is
        answered and retrieved for as at its first arrival, as far as the rows it saw are still there. Raises
        DeviceMemoryFull where there is no scratch, and then nothing is changed at all.
        """
        outcomes = self._plan(batches)
        try:
            found = self._retrieve(outcomes)
            for at, hits in found.items():
                try:
                    carry(at, hits)
                except MemstoreError as error:
                    outcomes[at] = error
            staged = stage(self._slab, _plans_of(outcomes), self._table.free_places)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryFull("no working memory is left on the device; nothing was changed") from error
        results = [
            outcome if isinstance(outcome, MemstoreError) else self._commit_batch(outcome, found.get(at))
            for at, outcome in enumerate(outcomes)
        ]
        if staged is not None:
            self._slab.write(staged.rows, staged.cells)
            if self._index.is_told:
                self._tell_index(_plans_of(outcomes))
        return results

    def reset(self, names: SequenceOf[str], release: bool) -> list[int]:
        """Empties sequences and gives their new epochs; 0 for one that does not exist, or, with `release`, no more."""
        epochs = []
        for name in names:
            sequence = self._table.get(name)
            if sequence is None:
                epochs.append(0)
            elif release:
                self._forget_rows(sequence)
                self._table.remove(name)
                epochs.append(0)
            else:
                self._restart(sequence)
                epochs.append(sequence.epoch)
        return epochs

    def fork(self, source: str, target: str, as_of: int | None, epoch: int) -> SequenceResult:
        """Gives a new sequence the live positions of another below `as_of`, by copying: its place is reserved anyway.

        Raises NotFound (source), AlreadyExists (target), EpochChanged, PositionExpired (beyond what is published),
        QuotaExceeded; nothing is changed then. first_position of the result is the target's next position.
        """
        origin = self._table.get(source)
        if origin is None:
            raise NotFound(f"source: there is no sequence {source!r}")
        if self._table.get(target) is not None:
            raise AlreadyExists(f"target: sequence {target!r} exists")
        plan = plan_part(
            SequencePart(sequence=source, num_rows=0, epoch=epoch, as_of=as_of),
            origin,
            self.spec.capacity,
            writer=None,
            fingerprint=0,
        )
        sequence = self._table.create(target, self._new_epoch())
        sequence.next_position, sequence.floor = plan.as_of, plan.begin
        for run in ring.runs(plan.begin, plan.as_of, self.spec.capacity):
            self._slab.copy_place(origin.place, sequence.place, run.slot, run.length)
        self._index.forked(self._slab, origin.place, sequence.place, plan.begin, plan.as_of)
        self._appended_rows += (plan.as_of - plan.begin) * self.spec.num_layers
        return SequenceResult(epoch=sequence.epoch, as_of=plan.as_of, live_begin=plan.begin, first_position=plan.as_of)

    def counts(self) -> MemoryCounts:
        """What the memory holds now. appended_rows counts forked rows too: num_rows = appended_rows - evicted_rows."""
        return MemoryCounts(
            num_sequences=len(self._table),
            num_rows=self._appended_rows - self._evicted_rows,
            reserved_bytes=self.reserved_bytes,
            appended_rows=self._appended_rows,
            evicted_rows=self._evicted_rows,
            index=self._index.counts(),
        )

    def stop_builds(self) -> None:
        """Ends the background work of the index for good; everything is scanned from now on."""
        self._index.close()

    def free(self) -> None:
        """Gives everything back to the device, but for what `join` waits for; the memory is of no use afterwards."""
        self.stop_builds()
        self._slab.free()

    def join(self) -> None:
        """After `free`, in any thread: returns when the background work has ended, too."""
        self._index.join()

    def _plan(self, batches: SequenceOf[StepBatch]) -> list[BatchPlan | MemstoreError]:
        num_free = self._table.num_free
        outcomes: list[BatchPlan | MemstoreError] = []
        for batch in batches:
            try:
                plan = self._plan_batch(batch, num_free)
            except MemstoreError as error:
                outcomes.append(error)
            else:
                num_free -= plan.num_new
                outcomes.append(plan)
        return outcomes

    def _plan_batch(self, batch: StepBatch, num_free: int) -> BatchPlan:
        """Decides a batch against the state, changing nothing. Raises what makes it impossible."""
        fingerprints = batch.fingerprints or (0,) * len(batch.parts)
        writer = batch.writer if batch.append else None
        parts = tuple(
            plan_part(part, self._table.get(part.sequence), self.spec.capacity, writer=writer, fingerprint=fingerprint)
            for part, fingerprint in zip(batch.parts, fingerprints, strict=True)
        )
        plan = BatchPlan(batch=_on_device(batch, self.device), parts=parts)
        if plan.num_new > num_free:
            raise QuotaExceeded(
                f"sequences: {plan.num_new} new ones, but {self.spec.max_sequences - num_free} of "
                f"{self.spec.max_sequences} exist"
            )
        return plan

    def _retrieve(self, outcomes: SequenceOf[BatchPlan | MemstoreError]) -> dict[int, Hits]:
        """The hits of those that retrieve, by their number."""
        asking = {
            at: plan
            for at, plan in enumerate(outcomes)
            if isinstance(plan, BatchPlan) and plan.batch.retrieve is not None
        }
        return dict(zip(asking, retrieve(self._slab, self._index, list(asking.values())), strict=True))

    def _commit_batch(self, plan: BatchPlan, hits: Hits | None) -> StepResult:
        return StepResult(sequences=tuple(self._commit(plan.batch, part) for part in plan.parts), hits=hits)

    def _commit(self, batch: StepBatch, plan: PartPlan) -> SequenceResult:
        """Makes one part's change of state, and its answer. Cannot fail."""
        part, sequence = plan.part, plan.sequence
        if sequence is not None and part.start_of_sequence and not plan.is_replay:
            self._restart(sequence)
        if batch.append:
            sequence = sequence or self._table.create(part.sequence, self._new_epoch())
            if not plan.is_replay:
                self._advance(sequence, batch.writer, plan)
        return SequenceResult(
            epoch=0 if sequence is None else sequence.epoch,
            as_of=plan.as_of,
            live_begin=plan.begin,
            first_position=plan.first_position,
            num_appended=part.num_rows if batch.append else 0,
            is_replay=plan.is_replay,
        )

    def _advance(self, sequence: Sequence, writer: str, plan: PartPlan) -> None:
        """Counts the rows of an append as published, and its answer as given."""
        part, capacity = plan.part, self.spec.capacity
        num_live = sequence.next_position - sequence.begin(capacity)
        sequence.next_position += part.num_rows
        num_evicted = num_live + part.num_rows - (sequence.next_position - sequence.begin(capacity))
        self._appended_rows += part.num_rows * self.spec.num_layers
        self._evicted_rows += num_evicted * self.spec.num_layers
        if writer:
            reply = Reply(
                num_rows=part.num_rows,
                fingerprint=plan.fingerprint,
                as_of=plan.as_of,
                first_position=plan.first_position,
                begun_from=part.epoch if part.start_of_sequence else None,
            )
            sequence.remember(writer, reply)

    def _tell_index(self, plans: SequenceOf[BatchPlan]) -> None:
        """Says which sequences have new rows."""
        for plan in plans:
            for part in plan.parts if plan.batch.append else ():
                if part.part.num_rows and not part.is_replay:
                    sequence = self._table[part.part.sequence]
                    begin = sequence.begin(self.spec.capacity)
                    self._index.appended(self._slab, sequence.place, begin, sequence.next_position)

    def _restart(self, sequence: Sequence) -> None:
        self._forget_rows(sequence)
        sequence.restart(self._new_epoch())

    def _forget_rows(self, sequence: Sequence) -> None:
        num_live = sequence.next_position - sequence.begin(self.spec.capacity)
        self._evicted_rows += num_live * self.spec.num_layers
        self._index.forgotten(sequence.place)


def _plans_of(outcomes: SequenceOf[BatchPlan | MemstoreError]) -> list[BatchPlan]:
    return [outcome for outcome in outcomes if isinstance(outcome, BatchPlan)]


def _on_device(batch: StepBatch, device: torch.device) -> StepBatch:
    """The batch with its tensors on the device: they cross once, for the search and the append."""
    payloads = {name: rows.to(device, non_blocking=True) for name, rows in batch.payloads.items()}
    return replace(batch, keys=batch.keys.to(device, non_blocking=True), payloads=payloads)
