"""Appending: the rows of several batches that are to be kept, and the cells of the slab that they go to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memstore import ring
from memstore.retrieval import joined_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memstore.sequence import BatchPlan
    from memstore.slab import Slab, StagedRows


@dataclass(frozen=True, slots=True)
class StagedAppend:
    """Everything that appending takes device memory for; what is left cannot fail. cells: (n,) int64, on the device."""

    rows: StagedRows
    cells: torch.Tensor


def stage(slab: Slab, plans: Sequence[BatchPlan], free_places: Iterable[int]) -> StagedAppend | None:
    """Converts the rows of all appends that are not resends; None where there are none.

    free_places: those that new sequences will get, in their order.
    """
    appending = [plan for plan in plans if plan.batch.append]
    places = iter(free_places)
    cells: list[torch.Tensor] = []
    columns: list[torch.Tensor] = []
    first = 0
    for part in (part for plan in appending for part in plan.parts):
        place = next(places) if part.sequence is None else part.sequence.place
        num_rows = 0 if part.is_replay else min(part.part.num_rows, slab.capacity)
        first += part.part.num_rows
        if num_rows:  # only the last ones: those before would have left again
            end = part.first_position + part.part.num_rows
            cells.append(place * slab.capacity + ring.slot_of(torch.arange(end - num_rows, end), slab.capacity))
            columns.append(torch.arange(first - num_rows, first))
    if not cells:
        return None
    is_whole = sum(map(len, columns)) == first
    chosen = None if is_whole else torch.cat(columns).to(slab.device)

    def rows(batches: list[torch.Tensor]) -> torch.Tensor:
        joined = joined_rows(batches)
        return joined if chosen is None else joined.index_select(1, chosen)

    keys = rows([plan.batch.keys for plan in appending])
    payloads = {name: rows([plan.batch.payloads[name] for plan in appending]) for name in slab.payloads}
    return StagedAppend(slab.stage(keys, payloads), slab.in_all_layers(torch.cat(cells).to(slab.device)))
