"""Planner: batches of steps against the state of one memory, decided before anything of them is done."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from memstore.errors import MemstoreError, QuotaExceeded
from memstore.sequence import BatchPlan, plan_part

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from memstore.lender import Lender
    from memstore.sequence import SequenceTable
    from memstore.types import MemorySpec, StepBatch


class Planner:
    """See above; changes nothing but that leases are asked back. Called by the device's thread only."""

    def __init__(self, spec: MemorySpec, device: torch.device, table: SequenceTable, lender: Lender) -> None:
        """device: where the tensors of the plans shall be. lender: of the sequences in the table."""
        self._spec = spec
        self._device = device
        self._table = table
        self._lender = lender

    def plan(self, batches: Sequence[StepBatch]) -> list[BatchPlan | MemstoreError]:
        """Each batch beside those before it; its error where it does not fit."""
        num_free = self._table.num_free
        outcomes: list[BatchPlan | MemstoreError] = []
        for batch in batches:
            try:
                plan = self._plan_one(batch, num_free)
            except MemstoreError as error:
                outcomes.append(error)
            else:
                num_free -= plan.num_new
                outcomes.append(plan)
        return outcomes

    def _plan_one(self, batch: StepBatch, num_free: int) -> BatchPlan:
        """Decides a batch against the state, changing nothing. Raises what makes it impossible."""
        for part in batch.parts:
            if batch.append or part.start_of_sequence:
                self._lender.check_writable(part.sequence, batch.writer)
        fingerprints = batch.fingerprints or (0,) * len(batch.parts)
        writer = batch.writer if batch.append else None
        parts = tuple(
            plan_part(part, self._table.get(part.sequence), self._spec.capacity, writer=writer, fingerprint=fingerprint)
            for part, fingerprint in zip(batch.parts, fingerprints, strict=True)
        )
        plan = BatchPlan(batch=_on_device(batch, self._device), parts=parts)
        if plan.num_new > num_free:
            self._lender.check_kept()
            raise QuotaExceeded(
                f"sequences: {plan.num_new} new ones, but there are {self._spec.total_sequences - num_free} of the "
                f"{self._spec.total_sequences} that the memory can have"
            )
        return plan


def plans_of(outcomes: Sequence[BatchPlan | MemstoreError]) -> list[BatchPlan]:
    """Those that fit."""
    return [outcome for outcome in outcomes if isinstance(outcome, BatchPlan)]


def _on_device(batch: StepBatch, device: torch.device) -> StepBatch:
    """The batch with its tensors on the device: they cross once, for the search and the append."""
    if device.type == "cpu" and not batch.keys.is_cuda and not any(rows.is_cuda for rows in batch.payloads.values()):
        return batch
    payloads = {name: rows.to(device, non_blocking=True) for name, rows in batch.payloads.items()}
    return replace(batch, keys=batch.keys.to(device, non_blocking=True), payloads=payloads)
