"""Inverted lists on a GPU: the rows of a generation by the centres that they are nearest to; the rows stay in the slab.

The centres of all lists of a place lie in a ring of a slab of their own, so that the lists of a query are found as rows
are. Beside each centre are the rows of its list, see listing.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import triton

from memstore.gpu import launch
from memstore.gpu.kernels.lists import finish_lists_kernel, score_lists_kernel
from memstore.gpu.launch import METRICS, Asked, Found, chaining
from memstore.gpu.retriever import hits_of, positions_of
from memstore.gpu.rings import FANOUT, Ring, TableSizes, tables
from memstore.gpu.tuning import scan_shape
from memstore.slab import Slab, StagedRows
from memstore.types import MemorySpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from memstore.gpu.listing import Lists, ListShape
    from memstore.search import SearchBatch
    from memstore.types import Hits, RetrieveOptions

BLOCK_ROWS = 32
"""Rows of a list that are read at a time."""

SCRATCH_BYTES = 1 << 30
"""What the scores of rows in lists may take, or those of one query where they are more."""


class Ranges(NamedTuple):
    """What each sequence of a batch sees, (S, 2) int64: generations by number, and positions that are scanned."""

    generations: NDArray[np.int64]
    scanned: tuple[NDArray[np.int64], ...]


class ListRetriever:
    """For one thread at a time. Raises DeviceMemoryFull at creation."""

    def __init__(self, spec: MemorySpec, shape: ListShape, device: torch.device) -> None:
        self._shape = shape
        self._lists = Slab(centre_spec(spec, shape), device)
        self._rows = torch.full((self._lists.num_cells, shape.width), -1, dtype=torch.int32, device=device)

    def put(self, place: int, number: int, layers: Sequence[Lists]) -> None:
        """A generation is there, in every layer. What it is made of may have come from another stream."""
        begin = self._slot(number)
        end = begin + self._shape.num_together
        staged = self._lists.stage(torch.stack([lists.centres for lists in layers]), {})
        slots = torch.arange(begin, end, device=self._lists.device) + place * self._lists.capacity
        cells = self._lists.in_all_layers(slots)
        self._lists.write(StagedRows(staged.keys, staged.norms, {}), cells)
        self._rows.index_copy_(0, cells, torch.cat([lists.rows for lists in layers]))
        if self._rows.is_cuda:
            for tensor in (tensor for lists in layers for tensor in lists):
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def copy(self, source: int, target: int, number: int) -> None:
        """A place has a generation of another one."""
        slot, length = self._slot(number), self._shape.num_together
        self._lists.copy_place(source, target, slot, length)
        rows = self._rows.view(self._lists.num_layers, self._lists.num_places, self._lists.capacity, -1)
        rows[:, target, slot : slot + length] = rows[:, source, slot : slot + length]

    def search(self, slab: Slab, batch: SearchBatch, ranges: Ranges) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See VectorIndex.search; None where a query would have fewer hits than there are rows to be seen."""
        groups = np.arange(len(batch.layers) * len(batch.places)).reshape(len(batch.layers), -1)
        _, found, num_short = self._found(slab, batch, ranges, groups, None)
        return None if int(num_short) else positions_of(batch, found)

    def retrieve(
        self, slab: Slab, batch: SearchBatch, ranges: Ranges, options: RetrieveOptions, groups: NDArray[np.int64]
    ) -> Hits | None:
        """See VectorIndex.retrieve; None where a query would have fewer hits than there are rows to be seen."""
        asked, found, num_short = self._found(slab, batch, ranges, groups, options)
        located = launch.located_for(asked)
        launch.locate(slab, asked, found, located)
        return None if int(num_short) else hits_of(slab, batch, options, found, located)

    def free(self) -> None:
        """Gives the lists back."""
        self._lists.free()
        self._rows = torch.empty(0)

    def _slot(self, number: int) -> int:
        """Of the first list of a generation."""
        return number % self._shape.num_generations * self._shape.num_together

    def _found(
        self,
        slab: Slab,
        batch: SearchBatch,
        ranges: Ranges,
        groups: NDArray[np.int64],
        options: RetrieveOptions | None,
    ) -> tuple[Asked, Found, torch.Tensor]:
        """What the lists and the scanned positions have, and (1,) int32: queries with fewer hits than there can be."""
        shape = self._shape
        begins, ends = (ranges.generations * shape.num_together).T.tolist()
        some = replace(batch, begins=tuple(begins), ends=tuple(ends), top_k=shape.num_chosen)
        searches = [(slab, batch, options), (self._lists, some, None)]
        for begins, ends in (scanned.T.tolist() for scanned in ranges.scanned):
            if begins != ends:
                searches.append((slab, replace(batch, begins=tuple(begins), ends=tuple(ends)), None))
        asked, lists, *others = _all_asked(searches, groups)
        chosen = launch.found_for(lists)
        launch.search(self._lists, lists, chosen)
        scanned = [self._scanned(slab, batch, asked, other) for other in others]
        found = launch.found_for(asked)
        num_short = torch.zeros(1, dtype=torch.int32, device=slab.device)
        each = shape.num_chosen * shape.width * 4 * (FANOUT + 1) // FANOUT
        step = max(SCRATCH_BYTES // each, 1)
        for first in range(0, asked.sizes.num_queries, step):
            piece = slice(first, min(first + step, asked.sizes.num_queries))
            self._finish(slab, asked, lists, chosen, piece, _joined(scanned), found, num_short)
        return asked, found, num_short

    def _scanned(self, slab: Slab, batch: SearchBatch, asked: Asked, other: Asked) -> Found:
        """Hits among positions that are scanned, their offsets from the first position that the batch sees."""
        found = launch.found_for(other)
        launch.search(slab, other, found)
        apart = (other.tables.rings[:, Ring.BEGIN] - asked.tables.rings[:, Ring.BEGIN])[asked.tables.query_rings]
        offsets = torch.where(found.offsets < 0, -1, found.offsets + apart[:, None].int())
        return found._replace(offsets=offsets)

    def _finish(
        self,
        slab: Slab,
        asked: Asked,
        lists: Asked,
        chosen: Found,
        piece: slice,
        others: tuple[torch.Tensor, torch.Tensor] | None,
        found: Found,
        num_short: torch.Tensor,
    ) -> None:
        """Fills `found` for some queries."""
        shape, num_queries = self._shape, piece.stop - piece.start
        leaves = shape.num_chosen * shape.width // FANOUT
        scores = torch.empty((num_queries, leaves * FANOUT), device=slab.device)
        maxima = torch.empty((num_queries, leaves), device=slab.device)
        of_lists = (asked.tables.rings, asked.tables.query_rings, lists.tables.rings, chosen.offsets, self._rows)
        counts = (self._lists.capacity, shape.num_together, shape.span)
        score_lists_kernel[(num_queries, shape.num_chosen)](
            asked.queries,
            slab.keys,
            scores if slab.norms is None else slab.norms,
            *of_lists,
            scores,
            maxima,
            *counts,
            slab.capacity,
            shape.num_chosen,
            piece.start,
            DIM=slab.dim,
            METRIC=METRICS[slab.metric],
            WIDTH=shape.width,
            BLOCK_N=BLOCK_ROWS,
            BLOCK_D=min(256, max(triton.next_power_of_2(slab.dim), 16)),
            num_warps=4,
            **chaining(slab),
        )
        top = max(triton.next_power_of_2(asked.top_k), 2)
        num_others = 0 if others is None else others[0].shape[1]
        finish_lists_kernel[(num_queries,)](
            *of_lists,
            scores,
            maxima,
            torch.empty((num_queries, top), dtype=torch.int32, device=slab.device),
            *((found.offsets, found.scores) if others is None else others),
            found.offsets,
            found.scores,
            found.bitmap,
            num_short,
            *counts,
            shape.num_chosen,
            num_others,
            found.bitmap.shape[1],
            piece.start,
            asked.top_k,
            asked.window_before,
            asked.window,
            WIDTH=shape.width,
            LEAVES=max(triton.next_power_of_2(leaves), top),
            OTHERS=max(triton.next_power_of_2(num_others), top) if num_others else 0,
            TOP=top,
            num_warps=4,
            **chaining(slab),
        )


def centre_spec(spec: MemorySpec, shape: ListShape) -> MemorySpec:
    """Of the slab that centres lie in: they are searched by the memory's metric, in its dtype."""
    return MemorySpec(
        name=spec.name,
        dim=spec.dim,
        capacity=shape.num_generations * shape.num_together,
        num_layers=spec.num_layers,
        max_sequences=spec.max_sequences,
        dtype=spec.dtype,
        metric=spec.metric,
    )


def _joined(some: Sequence[Found]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All hits of each query."""
    if len(some) < 2:
        return (some[0].offsets, some[0].scores) if some else None
    return torch.cat([found.offsets for found in some], 1), torch.cat([found.scores for found in some], 1)


def _all_asked(
    searches: Sequence[tuple[Slab, SearchBatch, RetrieveOptions | None]], groups: NDArray[np.int64]
) -> list[Asked]:
    """Searches for the same queries; their tables cross to the device in one copy."""
    device, queries = searches[0][0].device, searches[0][1].queries
    most_queries = max(searches[0][1].counts, default=0)
    flat_queries = queries.flatten(0, 1).contiguous()
    shapes = [scan_shape(slab.dim, slab.keys.dtype, queries.dtype, most_queries) for slab, _, _ in searches]
    made: list[tuple[TableSizes, NDArray[np.int64]]] = [
        tables(slab, batch, groups, shape.queries) for (slab, batch, _), shape in zip(searches, shapes, strict=True)
    ]
    flat = torch.from_numpy(np.concatenate([table for _, table in made])).to(device, non_blocking=True)
    each = torch.split_with_sizes(flat, [sizes.size for sizes, _ in made])
    return [
        Asked(
            queries=flat_queries,
            tables=sizes.split(table),
            sizes=sizes,
            shape=shape,
            top_k=batch.top_k,
            num_supers=launch.num_supers_of(slab, batch.ends),
            window_before=0 if options is None else options.window_before,
            window=0 if options is None else options.window,
        )
        for (slab, batch, options), shape, (sizes, _), table in zip(searches, shapes, made, each, strict=True)
    ]
