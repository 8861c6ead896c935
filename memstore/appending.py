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
    """Everything that appending takes device memory for; what is left cannot fail.

    first_cells: (n,) of layer 0. cells: (layers * n,) int64, on the device, or as compiled code takes them on the host.
    """

    rows: StagedRows
    first_cells: NDArray[np.int64]
    cells: torch.Tensor | NDArray[np.int64]


def stage(
    slab: Slab, plans: Sequence[BatchPlan], places_of_new: Callable[[list[str]], Iterator[int]]
) -> StagedAppend | None:
    """Converts the rows of all appends that are not resends; None where there are none.

    places_of_new: the places that new sequences of these names will get, in their order.
    """
    appending = [plan for plan in plans if plan.batch.append]
    places = places_of_new([part.part.sequence for plan in appending for part in plan.parts if part.sequence is None])
    kept: list[tuple[int, int, int, int]] = []
    capacity, num_rows = slab.capacity, 0
    for plan in appending:
        for part in plan.parts:
            place = next(places) if part.sequence is None else part.sequence.place
            count = part.part.num_rows
            num_rows += count
            num_kept = 0 if part.is_replay else min(count, capacity)
            if num_kept:  # only the last ones: those before would have left again
                end = part.first_position + count
                kept.append((place * capacity, end - num_kept, num_rows - num_kept, num_kept))
    if not kept:
        return None
    first_cells, columns = _cells_and_columns(kept, capacity)
    chosen = None if len(columns) == num_rows else torch.from_numpy(columns).to(slab.device, non_blocking=True)

    def rows(batches: list[torch.Tensor]) -> torch.Tensor:
        joined = joined_rows(batches)
        return joined if chosen is None else joined.index_select(1, chosen)

    keys = rows([plan.batch.keys for plan in appending])
    payloads = {name: rows([plan.batch.payloads[name] for plan in appending]) for name in slab.payloads}
    compiled = _compiled(slab)
    staged = slab.stage(keys, payloads, None if compiled is None else compiled.norms_of)
    return StagedAppend(staged, first_cells, _everywhere(slab, first_cells, is_compiled=compiled is not None))


def _everywhere(slab: Slab, first_cells: NDArray[np.int64], *, is_compiled: bool) -> torch.Tensor | NDArray[np.int64]:
    """Cells of layer 0, in all layers, for `write`."""
    if is_compiled and slab.num_layers == 1:
        return first_cells
    cells = slab.in_all_layers(torch.from_numpy(first_cells).to(slab.device, non_blocking=True))
    return cells.numpy() if is_compiled else cells


def write(slab: Slab, staged: StagedAppend) -> None:
    """Puts staged rows into their cells. Cannot fail, and takes no memory."""
    if isinstance(staged.cells, torch.Tensor):
        slab.write(staged.rows, staged.cells)
    elif (compiled := _compiled(slab)) is not None:
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
    return torch.from_numpy(_cells_and_columns(table, capacity)[0]) if table else torch.empty(0, dtype=torch.int64)


def _cells_and_columns(
    kept: Sequence[tuple[int, int, int, int]], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(first cell of the place, first position, first column, rows) of each -> the cell and the column of every row.

    Positions and columns count on from the first ones.
    """
    if all(count == 1 for _, _, _, count in kept):
        cells = [first + ring.slot_of(position, capacity) for first, position, _, _ in kept]
        return np.array(cells), np.array([column for _, _, column, _ in kept])
    first_cells, positions, columns, counts = np.array(kept, np.int64).T
    ends = counts.cumsum()
    nth = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
    slots = ring.slot_of(np.repeat(positions, counts) + nth, capacity)
    return np.repeat(first_cells, counts) + slots, np.repeat(columns, counts) + nth
