"""GraphRetriever: graphs on a GPU, walked for every query at once, through all generations of its place.

The rows stay in the slab; kept beside them are the links of each place's generations, see graphing.py, and a copy of
the rows at which walks may begin, in a ring of a slab of their own, so that the nearest are found as rows are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from memstore.errors import DeviceMemoryFull
from memstore.gpu import launch
from memstore.gpu.kernels.graphs import finish_walks_kernel, walk_kernel
from memstore.gpu.launch import Asked, Found
from memstore.gpu.launcher import chained
from memstore.gpu.maxima import METRICS
from memstore.gpu.ranges import joined, num_supers_of_run, runs_of, scan_many, scanned
from memstore.gpu.retriever import hits_of, positions_of
from memstore.gpu.rings import in_one_copy, tables
from memstore.gpu.tuning import power_of_two, scan_shape
from memstore.slab import Slab, keys_spec
from memstore.types import NO_ROOM

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from memstore.gpu.graphing import Graph, GraphShape
    from memstore.gpu.ranges import Ranges
    from memstore.search import SearchBatch
    from memstore.types import Hits, MemorySpec, RetrieveOptions

PLACES = 8
"""Where hits of a query are found at most, as a power of two: the walk, and four runs that are scanned."""

MOST_STEPS = 4
"""A walk ends after so many steps for each step that it takes to go on from every row that it keeps, at the latest."""

ELEMENTS = 16_384
"""Of rows, that a program of a walk reads at a time."""

FEW_MET = 64
"""Up to so many rows that a walk keeps, fewer threads are quicker."""


class GraphRetriever:
    """See PartRetriever. Raises DeviceMemoryFull at creation."""

    keeps_dying = False

    def __init__(self, spec: MemorySpec, shape: GraphShape, device: torch.device) -> None:
        self._shape = shape
        self._entries = Slab(keys_spec(spec, shape.num_generations * shape.num_entries), device)
        size = (spec.num_layers, spec.max_sequences, shape.num_generations, shape.span, shape.num_links)
        try:
            self._links = torch.full(size, -1, dtype=torch.int32, device=device)
        except NO_ROOM as error:
            raise DeviceMemoryFull(f"no room for graphs of {spec.capacity:,} rows on {device}") from error

    def put(self, place: int, number: int, layers: Sequence[Graph]) -> None:
        """See PartRetriever."""
        for mine, graph in zip(self._links[:, place, number % self._shape.num_generations], layers, strict=True):
            num_rows, num_links = graph.links.shape
            mine.fill_(-1)
            links = torch.where(graph.links < 0, -1, graph.links + graph.first)
            mine[graph.first : graph.first + num_rows, :num_links] = links
        entries = self._entries
        slots = torch.arange(self._shape.num_entries, device=entries.device) + self._slot(number)
        staged = entries.stage(torch.stack([graph.entries for graph in layers]), {})
        entries.write(staged, entries.in_all_layers(slots + place * entries.capacity))
        if self._links.is_cuda:
            for tensor in (tensor for graph in layers for tensor in (graph.links, graph.entries)):
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def copy(self, source: int, target: int, number: int) -> None:
        """See PartRetriever."""
        at, slot = number % self._shape.num_generations, self._slot(number)
        self._links[:, target, at] = self._links[:, source, at]
        self._entries.copy_place(source, target, slot, self._shape.num_entries)

    def search(self, slab: Slab, batch: SearchBatch, ranges: Ranges) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See PartRetriever."""
        found, num_short, _ = self._found(slab, batch, ranges, batch.groups, None)
        return None if int(num_short) else positions_of(batch, found)

    def retrieve(
        self,
        slab: Slab,
        batch: SearchBatch,
        ranges: Ranges,
        options: RetrieveOptions,
        groups: NDArray[np.int64],
        *,
        is_building: bool = False,
    ) -> Hits | None:
        """See PartRetriever."""
        del is_building
        found, num_short, asked = self._found(slab, batch, ranges, groups, options)
        located = launch.located_for(asked)
        launch.locate(slab, asked, found, located)
        return None if int(num_short) else hits_of(slab, batch, options, found, located)

    def scan_once(self, slab: Slab, batch: SearchBatch, ranges: Ranges) -> None:
        """Searches for nothing in rings of many sizes, for which other kernels are compiled."""
        scan_many(slab, self._asked(slab, batch, ranges, batch.groups, None)[0])

    def free(self) -> None:
        """See PartRetriever."""
        self._links = torch.empty(0)
        self._entries.free()

    def _found(
        self,
        slab: Slab,
        batch: SearchBatch,
        ranges: Ranges,
        groups: NDArray[np.int64],
        options: RetrieveOptions | None,
    ) -> tuple[Found, torch.Tensor, Asked]:
        """The hits; (1,) int32, queries that have fewer than there are rows to be seen; and what was asked."""
        asked, entries, runs = self._asked(slab, batch, ranges, groups, options)
        found, chosen = launch.found_for(asked), launch.found_for(entries)
        launch.search(self._entries, entries, chosen)
        others = joined([self._walked(slab, asked, entries, chosen), *(scanned(slab, asked, run) for run in runs)])
        num_short = torch.zeros(1, dtype=torch.int32, device=slab.device)
        if others is not None and asked.sizes.num_queries:
            _finish(slab, asked, others, found, num_short)
        return found, num_short, asked

    def _walked(self, slab: Slab, asked: Asked, entries: Asked, chosen: Found) -> Found:
        """The hits of a walk for each query."""
        shape, found = self._shape, launch.found_for(replace(asked, window=0))
        width = power_of_two(shape.num_links)
        kept = max(shape.num_met, width, asked.top)
        if asked.sizes.num_queries:
            walk_kernel[(asked.sizes.num_queries,)](
                asked.queries,
                slab.keys,
                found.scores if slab.norms is None else slab.norms,
                asked.tables.rings,
                asked.tables.query_rings,
                entries.tables.rings,
                chosen.offsets,
                self._links,
                found.offsets,
                found.scores,
                shape.span,
                shape.num_entries,
                shape.stride,
                shape.num_generations,
                slab.capacity,
                entries.top_k,
                MOST_STEPS * width,
                asked.top_k,
                DIM=slab.dim,
                METRIC=METRICS[slab.metric],
                LINKS=shape.num_links,
                WIDTH=width,
                LIST=kept,
                BLOCK_D=min(ELEMENTS // kept, max(power_of_two(slab.dim), 16)),
                num_warps=8 if kept > FEW_MET else 4,
                **chained(slab.device),
            )
        return found

    def _asked(
        self,
        slab: Slab,
        batch: SearchBatch,
        ranges: Ranges,
        groups: NDArray[np.int64],
        options: RetrieveOptions | None,
    ) -> tuple[Asked, Asked, list[Asked]]:
        """The whole, the search for entries, and those of what is scanned. Tables cross to the device in one copy."""
        queries, most_queries = batch.queries.flatten(0, 1).contiguous(), max(batch.counts, default=0)
        shape = scan_shape(slab.dim, slab.keys.dtype, queries.dtype, most_queries)
        begins, ends = (ranges.generations * self._shape.num_entries).T.tolist()
        of_entries = replace(batch, begins=tuple(begins), ends=tuple(ends))
        runs = runs_of(batch, ranges, slab.capacity)
        made = [
            tables(each, some, groups, shape.queries) for each, some in ((slab, batch), (self._entries, of_entries))
        ]
        made += [tables(slab, run, groups, shape.queries, are_runs=True) for run in runs]
        whole, entries, *of_runs = in_one_copy(made, slab.device)
        first = Asked(
            queries=queries,
            tables=whole,
            sizes=made[0][0],
            shape=shape,
            top_k=batch.top_k,
            num_supers=launch.num_supers_of(slab, batch.ends),
            window_before=0 if options is None else options.window_before,
            window=0 if options is None else options.window,
        )
        scans = [
            replace(first, tables=of, sizes=sizes, num_supers=num_supers_of_run(run), window=0)
            for of, (sizes, _), run in zip(of_runs, made[2:], runs, strict=True)
        ]
        num_supers = launch.num_supers_of(self._entries, of_entries.ends)
        num_met = self._shape.num_met
        second = replace(first, tables=entries, sizes=made[1][0], num_supers=num_supers, top_k=num_met, window=0)
        return first, second, scans

    def _slot(self, number: int) -> int:
        """Of the first entry of a generation."""
        return number % self._shape.num_generations * self._shape.num_entries


def _finish(
    slab: Slab, asked: Asked, others: tuple[torch.Tensor, torch.Tensor], found: Found, num_short: torch.Tensor
) -> None:
    """Fills `found` with the best of what was found in several places."""
    num_others = others[0].shape[1]
    finish_walks_kernel[(asked.sizes.num_queries,)](
        asked.tables.rings,
        asked.tables.query_rings,
        *others,
        found.offsets,
        found.scores,
        found.bitmap,
        num_short,
        num_others,
        found.bitmap.shape[1],
        asked.top_k,
        asked.window_before,
        asked.window,
        OTHERS=PLACES * asked.top,
        TOP=asked.top,
        num_warps=4,
        **chained(slab.device),
    )
