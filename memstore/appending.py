"""Appending: the rows of several batches that are to be kept, and the cells of the slab that they go to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memstore import ring
from memstore.retrieval import joined_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memstore.sequence import BatchPlan, PartPlan
    from memstore.slab import Slab, StagedRows


@dataclass(frozen=True, slots=True)
class Kept:
    """The rows of one part that will still be live after its append: the last `num_rows` of the part."""

    plan: PartPlan
    num_rows: int


@dataclass(frozen=True, slots=True)
class StagedAppend:
    """Everything that appending takes device memory for; what is left cannot fail."""

    kept: tuple[Kept, ...]
    rows: StagedRows


def stage(slab: Slab, plans: Sequence[BatchPlan]) -> StagedAppend | None:
    """Converts the rows of all appends that are not resends; None where there are none."""
    appending = [plan for plan in plans if plan.batch.append]
    kept: list[Kept] = []
    columns: list[torch.Tensor] = []
    first = 0
    for part in (part for plan in appending for part in plan.parts):
        num_rows = 0 if part.is_replay else min(part.part.num_rows, slab.capacity)
        end = first + part.part.num_rows
        if num_rows:
            kept.append(Kept(part, num_rows))
            columns.append(torch.arange(end - num_rows, end))
        first = end
    if not kept:
        return None
    is_whole = sum(each.num_rows for each in kept) == first
    chosen = None if is_whole else torch.cat(columns).to(slab.device)

    def rows(batches: list[torch.Tensor]) -> torch.Tensor:
        joined = joined_rows(batches)
        return joined if chosen is None else joined.index_select(1, chosen)

    keys = rows([plan.batch.keys for plan in appending])
    payloads = {name: rows([plan.batch.payloads[name] for plan in appending]) for name in slab.payloads}
    return StagedAppend(tuple(kept), slab.stage(keys, payloads))


def cells_of(kept: Sequence[tuple[int, range]], slab: Slab) -> torch.Tensor:
    """(n,) int64: place * capacity + slot of each of some positions of some places, on the slab's device."""
    cells = [
        place * slab.capacity + ring.slot_of(torch.arange(positions.start, positions.stop), slab.capacity)
        for place, positions in kept
    ]
    return torch.cat(cells).to(slab.device)
