"""Planner: batches of steps against the state of one memory, decided before anything of them is done."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from memstore.errors import InvalidRequest, MemstoreError, QuotaExceeded
from memstore.sequence import BatchPlan, plan_part

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from memstore.lender import Lender
    from memstore.sequence import PartPlan, SequenceTable
    from memstore.types import MemorySpec, StepBatch


MOST_PRODUCTS = {"cpu": 1 << 43, "cuda": 1 << 49}
"""Products of elements that one retrieval may take, by the kind of device: a minute or two of a small one, where 4,096
queries of dimension 128 of the largest sequence that is searched exactly just fit. Nobody else is served meanwhile.
"""
SCORE_PRODUCTS = 128
"""A score costs as much as so many products at least, however short the rows are."""


class Planner:
    """See above; changes nothing but that leases are asked back. Called by the device's thread only."""

    def __init__(self, spec: MemorySpec, device: torch.device, table: SequenceTable, lender: Lender) -> None:
        """device: where the tensors of the plans shall be. lender: of the sequences in the table."""
        self._spec = spec
        self._device = device
        self._most_products = MOST_PRODUCTS[device.type]
        self._most_rows = _most_rows(spec)
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
        if len(self._lender):
            for part in batch.parts:
                if batch.append or part.start_of_sequence:
                    self._lender.check_writable(part.sequence, batch.writer)
        fingerprints = batch.fingerprints or (0,) * len(batch.parts)
        writer = batch.writer if batch.append else None
        parts = tuple(
            plan_part(part, self._table.get(part.sequence), self._spec.capacity, writer=writer, fingerprint=fingerprint)
            for part, fingerprint in zip(batch.parts, fingerprints, strict=True)
        )
        if batch.retrieve is not None:
            self._check_products(batch, parts)
        plan = BatchPlan(batch=on_device(batch, self._device), parts=parts)
        if plan.num_new > num_free:
            self._lender.check_kept()
            raise QuotaExceeded(
                f"sequences: {plan.num_new} new ones, but there are {self._spec.total_sequences - num_free} of the "
                f"{self._spec.total_sequences} that the memory can have"
            )
        return plan

    def _check_products(self, batch: StepBatch, parts: Sequence[PartPlan]) -> None:
        """InvalidRequest where the search of a batch would keep the device for too long."""
        of_a_row = batch.keys.shape[0] * max(self._spec.dim, SCORE_PRODUCTS)
        if batch.keys.shape[1] * self._most_rows * of_a_row <= self._most_products:
            return
        scores = sum(min(part.num_seen, self._most_rows) * part.part.num_rows for part in parts)
        if scores * of_a_row > self._most_products:
            most = self._most_products // of_a_row
            raise InvalidRequest("sequences", f"{scores:,} scores a layer, at most {most:,} in a call; ask for fewer")


def _most_rows(spec: MemorySpec) -> int:
    """Rows of a sequence that are read for a query.

    Those of the last generation and a half may still be outside of any; of the others the lists that are probed.
    """
    settings = spec.index_settings
    if settings is None:
        return spec.capacity
    probed = spec.capacity * settings.nprobe // settings.nlist if settings.nlist else 0
    return min(spec.capacity, 2 * settings.generation_rows + probed)


def plans_of(outcomes: Sequence[BatchPlan | MemstoreError]) -> list[BatchPlan]:
    """Those that fit."""
    return [outcome for outcome in outcomes if isinstance(outcome, BatchPlan)]


def on_device(batch: StepBatch, device: torch.device) -> StepBatch:
    """The batch with its tensors on the device: they cross once, for the search and the append.

    What comes from a GPU to the host is there when this returns; nothing would wait for it afterwards.
    """
    if device.type == "cpu" and not batch.keys.is_cuda and not any(rows.is_cuda for rows in batch.payloads.values()):
        return batch
    may_be_late = device.type == "cuda"
    payloads = {name: rows.to(device, non_blocking=may_be_late) for name, rows in batch.payloads.items()}
    return replace(batch, keys=batch.keys.to(device, non_blocking=may_be_late), payloads=payloads)
