"""Grids: the queries of a ragged batch laid out so that neighbouring places of a slab are searched at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from memstore.search import SearchBatch
    from memstore.slab import Slab


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """P neighbouring places with n queries each. Some may be of no use: what they find is dropped.

    begins, ends: (P,) positions [begin, end) that each place's queries see. columns: the queries of the batch that are
    here. cells: (len(columns),) place * n + number of each of them; None where they just follow one another.
    """

    first_place: int
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    num_queries: int
    columns: slice | torch.Tensor
    cells: torch.Tensor | None = None

    def spread(self, queries: torch.Tensor) -> torch.Tensor:
        """(N, dim) of the batch -> (P, n, dim)."""
        mine = queries[self.columns]
        if self.cells is not None:
            mine = mine.new_zeros(len(self.begins) * self.num_queries, mine.shape[1]).index_copy_(0, self.cells, mine)
        return mine.view(len(self.begins), self.num_queries, -1)

    def collect(self, found: torch.Tensor) -> torch.Tensor:
        """(P, n, k) -> (len(columns), k)."""
        rows = found.flatten(0, 1)
        return rows if self.cells is None else rows.index_select(0, self.cells)


def grids(slab: Slab, batch: SearchBatch) -> list[Grid]:
    """Grids of every sequence that sees something.

    On a GPU, where each launch costs more than reading a ring, they are one where that does not double the work.
    """
    columns = {at: slice(first, end) for at, first, end in batch.sequences()}
    if slab.device.type == "cuda" and len(columns) > 1:
        low = min(batch.places[at] for at in columns)
        num_places = max(batch.places[at] for at in columns) - low + 1
        most = max(batch.counts[at] for at in columns)
        if num_places * most <= 2 * sum(batch.counts[at] for at in columns):
            return [_joined(batch, columns, low, num_places, most)]
    return [
        Grid(
            first_place=batch.places[at],
            begins=(batch.begins[at],),
            ends=(batch.ends[at],),
            num_queries=batch.counts[at],
            columns=mine,
        )
        for at, mine in columns.items()
    ]


def _joined(batch: SearchBatch, columns: dict[int, slice], low: int, num_places: int, most: int) -> Grid:
    """One grid of `num_places` places from `low`, each with room for `most` queries."""
    begins, ends = [0] * num_places, [0] * num_places
    cells: list[torch.Tensor] = []
    for at, mine in columns.items():
        place = batch.places[at] - low
        begins[place], ends[place] = batch.begins[at], batch.ends[at]
        cells.append(torch.arange(mine.stop - mine.start) + place * most)
    device = batch.queries.device
    where = torch.cat(cells)
    is_in_order = torch.equal(where, torch.arange(num_places * most))
    is_all = len(where) == batch.queries.shape[1]
    every = torch.cat([torch.arange(mine.start, mine.stop) for mine in columns.values()])
    return Grid(
        first_place=low,
        begins=tuple(begins),
        ends=tuple(ends),
        num_queries=most,
        columns=slice(None) if is_all else every.to(device),
        cells=None if is_in_order else where.to(device),
    )
