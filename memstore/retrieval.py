"""Retrieval: one search for the plans of several batches, and the hits of each, every distinct row once."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from memstore import ring
from memstore.index.base import SearchBatch
from memstore.types import Hits
from memstore.window import distinct_rows, window_offsets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memstore.index.base import VectorIndex
    from memstore.sequence import BatchPlan
    from memstore.slab import Slab
    from memstore.types import RetrieveOptions


def retrieve(slab: Slab, index: VectorIndex, plans: Sequence[BatchPlan], options: RetrieveOptions) -> list[Hits]:
    """The hits of each plan. They all retrieve with these options and for the same layers."""
    if not plans:
        return []
    search = _search_batch(plans, options.top_k)
    positions, scores = index.search(slab, search)
    begin, end = search.per_query(search.begins), search.per_query(search.ends)
    offsets = window_offsets(positions, begin, end, options.window_before, options.window_after)
    groups = _groups(plans, search)
    num_groups = len(search.layers) * len(search.places)
    rows = distinct_rows(offsets, groups.gather(1, _query_parts(search)), num_groups, slab.capacity)

    row_positions = rows.offsets + _by_group(groups, search.begins)[rows.groups]
    first_cells = _first_cells(slab, search, groups)
    cells = first_cells[rows.groups] + ring.slot_of(row_positions, slab.capacity)
    joined = Hits(
        row_splits=rows.row_splits,
        positions=row_positions,
        index=rows.index,
        scores=None if options.omit_scores else scores,
        arrays={name: slab.gather(name, cells) for name in options.arrays},
    )
    return _split(joined, plans)


def _search_batch(plans: Sequence[BatchPlan], top_k: int) -> SearchBatch:
    parts = [part for plan in plans for part in plan.parts]
    return SearchBatch(
        queries=joined_rows([plan.batch.keys for plan in plans]),
        layers=plans[0].batch.layers,
        places=tuple(0 if part.sequence is None else part.sequence.place for part in parts),
        counts=tuple(part.part.num_rows for part in parts),
        begins=tuple(part.begin for part in parts),
        ends=tuple(part.as_of for part in parts),
        top_k=top_k,
    )


def joined_rows(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """(L, N of each, ...) -> (L, N of all, ...); in float32 where their dtypes differ."""
    if len(batches) == 1:
        return batches[0]
    if len({batch.dtype for batch in batches}) > 1:
        batches = [batch.float() for batch in batches]
    return torch.cat(list(batches), 1)


def _groups(plans: Sequence[BatchPlan], search: SearchBatch) -> torch.Tensor:
    """(L, parts) int64: the group of each part in each layer; those of a batch follow one another, layer by layer."""
    num_layers = len(search.layers)
    firsts = accumulate((num_layers * len(plan.parts) for plan in plans), initial=0)
    blocks = [
        torch.arange(num_layers * len(plan.parts)).view(num_layers, -1) + first
        for plan, first in zip(plans, firsts, strict=False)
    ]
    return torch.cat(blocks, 1).to(search.queries.device)


def _query_parts(search: SearchBatch) -> torch.Tensor:
    """(L, N) int64: the part that each query belongs to."""
    parts = search.per_query(tuple(range(len(search.counts))))
    return parts.expand(len(search.layers), -1)


def _by_group(groups: torch.Tensor, values: Sequence[int]) -> torch.Tensor:
    """One value a part -> (G,) int64, one a group."""
    by_group = torch.empty(groups.numel(), dtype=torch.int64, device=groups.device)
    by_group[groups] = torch.tensor(values, dtype=torch.int64, device=groups.device)
    return by_group


def _first_cells(slab: Slab, search: SearchBatch, groups: torch.Tensor) -> torch.Tensor:
    """(G,) int64: the cell of slot 0 of each group's layer and place."""
    layers = torch.tensor(search.layers, device=groups.device)
    places = torch.tensor(search.places, device=groups.device)
    first_cells = torch.empty(groups.numel(), dtype=torch.int64, device=groups.device)
    first_cells[groups] = slab.first_cells(layers[:, None], places)
    return first_cells


def _split(joined: Hits, plans: Sequence[BatchPlan]) -> list[Hits]:
    """The hits of each plan out of those of all of them."""
    if len(plans) == 1:
        return [joined]
    num_groups = [len(plan.batch.layers) * len(plan.parts) for plan in plans]
    num_queries = [plan.batch.keys.shape[1] for plan in plans]
    groups = list(accumulate(num_groups, initial=0))
    queries = list(accumulate(num_queries, initial=0))
    rows = joined.row_splits[torch.tensor(groups, device=joined.row_splits.device)].tolist()
    split = []
    for at in range(len(plans)):
        mine = slice(rows[at], rows[at + 1])
        columns = slice(queries[at], queries[at + 1])
        index = joined.index[:, columns]
        split.append(
            replace(
                joined,
                row_splits=joined.row_splits[groups[at] : groups[at + 1] + 1] - mine.start,
                positions=joined.positions[mine],
                index=torch.where(index < 0, -1, index - mine.start),
                scores=None if joined.scores is None else joined.scores[:, columns],
                arrays={name: array[mine] for name, array in joined.arrays.items()},
            )
        )
    return split
