"""Retrieval: one search for the plans of several batches, and the hits of each, every distinct row once."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore.search import SearchBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from memstore.index.base import VectorIndex
    from memstore.sequence import BatchPlan
    from memstore.slab import Slab
    from memstore.types import Hits


def retrieve(slab: Slab, index: VectorIndex, plans: Sequence[BatchPlan]) -> list[Hits]:
    """The hits of each plan. They all retrieve, with equal options and for the same layers."""
    options = plans[0].batch.retrieve if plans else None
    if options is None:
        return []
    search = search_batch(plans, options.top_k)
    joined = index.retrieve(slab, search, options, _groups(plans, len(search.layers)))
    return _split(joined, plans)


def search_batch(plans: Sequence[BatchPlan], top_k: int) -> SearchBatch:
    """What is searched for the plans, all of them together."""
    parts = [
        (0 if part.sequence is None else part.sequence.place, part.part.num_rows, part.begin, part.as_of)
        for plan in plans
        for part in plan.parts
    ]
    places, counts, begins, ends = zip(*parts, strict=True)
    return SearchBatch(
        queries=joined_rows([plan.batch.keys for plan in plans]),
        layers=plans[0].batch.layers,
        places=places,
        counts=counts,
        begins=begins,
        ends=ends,
        top_k=top_k,
    )


def joined_rows(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """(L, N of each, ...) -> (L, N of all, ...); in float32 where their dtypes differ."""
    if len(batches) == 1:
        return batches[0]
    if len({batch.dtype for batch in batches}) > 1:
        batches = [batch.float() for batch in batches]
    return torch.cat(list(batches), 1)


def _groups(plans: Sequence[BatchPlan], num_layers: int) -> NDArray[np.int64]:
    """(L, parts): the group of each part in each layer; those of a batch follow one another, layer by layer."""
    sizes = [num_layers * len(plan.parts) for plan in plans]
    if len(sizes) == 1:
        return np.arange(sizes[0]).reshape(num_layers, -1)
    blocks = [
        np.arange(first, first + size).reshape(num_layers, -1)
        for first, size in zip(accumulate(sizes, initial=0), sizes, strict=False)
    ]
    return np.concatenate(blocks, axis=1)


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
