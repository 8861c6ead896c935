"""Appending: the rows of several batches that are to be kept, and the cells of the slab that they go to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore import ring
from memstore.retrieval import joined_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

    from numpy.typing import NDArray

    from memstore.sequence import BatchPlan
    from memstore.slab import Slab, StagedRows


@dataclass(frozen=True, slots=True)
class StagedAppend:
    """Everything that appending takes device memory for; what is left cannot fail. cells: (n,) int64, on the device."""

    rows: StagedRows
    cells: torch.Tensor

    @property
    def first_cells(self) -> torch.Tensor:
        """The cells of layer 0."""
        return self.cells[: self.rows.keys.shape[1]]


def stage(
    slab: Slab, plans: Sequence[BatchPlan], places_of_new: Callable[[list[str]], Iterator[int]]
) -> StagedAppend | None:
    """Converts the rows of all appends that are not resends; None where there are none.

    places_of_new: the places that new sequences of these names will get, in their order.
    """
    appending = [plan for plan in plans if plan.batch.append]
    places = places_of_new([part.part.sequence for plan in appending for part in plan.parts if part.sequence is None])
    kept: list[tuple[int, int, int, int]] = []
    num_rows = 0
    for part in (part for plan in appending for part in plan.parts):
        place = next(places) if part.sequence is None else part.sequence.place
        num_kept = 0 if part.is_replay else min(part.part.num_rows, slab.capacity)
        num_rows += part.part.num_rows
        if num_kept:  # only the last ones: those before would have left again
            end = part.first_position + part.part.num_rows
            kept.append((place * slab.capacity, end - num_kept, num_rows - num_kept, num_kept))
    if not kept:
        return None
    first_cells, positions, columns = _each_row(kept)
    cells = torch.from_numpy(first_cells + ring.slot_of(positions, slab.capacity)).to(slab.device, non_blocking=True)
    chosen = None if len(columns) == num_rows else torch.from_numpy(columns).to(slab.device, non_blocking=True)

    def rows(batches: list[torch.Tensor]) -> torch.Tensor:
        joined = joined_rows(batches)
        return joined if chosen is None else joined.index_select(1, chosen)

    keys = rows([plan.batch.keys for plan in appending])
    payloads = {name: rows([plan.batch.payloads[name] for plan in appending]) for name in slab.payloads}
    compiled = _compiled(slab)
    staged = slab.stage(keys, payloads, None if compiled is None else compiled.norms_of)
    return StagedAppend(staged, slab.in_all_layers(cells))


def write(slab: Slab, staged: StagedAppend) -> None:
    """Puts staged rows into their cells. Cannot fail, and takes no memory."""
    compiled = _compiled(slab)
    if compiled is None:
        slab.write(staged.rows, staged.cells)
    else:
        compiled.put(slab, staged.rows, staged.cells)


def _compiled(slab: Slab) -> ModuleType | None:
    """What does both for a slab of the host's; None for others, and where numba cannot be used."""
    return _placing() if slab.is_on_host else None


@cache
def _placing() -> ModuleType | None:
    try:
        from memstore.host import placing
    except ImportError:
        return None
    return placing


def cells_of(kept: Sequence[tuple[int, int, int]], capacity: int) -> torch.Tensor:
    """The cells of layer 0 of rows that follow one another. kept: (place, first position, rows) of each sequence."""
    table = [(place * capacity, position, 0, count) for place, position, count in kept if count]
    if not table:
        return torch.empty(0, dtype=torch.int64)
    first_cells, positions, _ = _each_row(table)
    return torch.from_numpy(first_cells + ring.slot_of(positions, capacity))


def _each_row(kept: Sequence[tuple[int, int, int, int]]) -> NDArray[np.int64]:
    """(first cell of the place, first position, first column, number of rows) of each -> (3, rows) int64, one a row.

    Positions and columns count on from the first ones.
    """
    parts = np.array(kept, np.int64).T
    firsts, counts = parts[:3], parts[3]
    if counts.max() == 1:
        return firsts
    ends = counts.cumsum()
    table = np.repeat(firsts, counts, axis=1)
    table[1:] += np.arange(ends[-1]) - np.repeat(ends - counts, counts)
    return table
