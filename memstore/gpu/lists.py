"""ListRetriever: inverted lists on a GPU, the rows of a generation by the centres that they are nearest to.

The rows stay in the slab. The centres of all lists of a place lie in a ring of a slab of their own, so that the lists
of a query are found as rows are; beside each centre are the rows of its list, see listing.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore.gpu import launch, list_launch
from memstore.gpu.launch import Asked
from memstore.gpu.list_graphs import ListGraphs
from memstore.gpu.list_launch import ListStore
from memstore.gpu.ranges import Ranges, num_supers_of_run, runs_of, scan_many
from memstore.gpu.retriever import hits_of, positions_of
from memstore.gpu.rings import in_one_copy, tables
from memstore.gpu.tuning import scan_shape
from memstore.search import SearchBatch
from memstore.slab import Slab, StagedRows, keys_spec
from memstore.types import RetrieveOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from memstore.gpu.listing import Lists, ListShape
    from memstore.types import Hits, MemorySpec


WARM_ROWS, WARM_COUNTS, WARM_OPTIONS = 1024, (1, 64, 512), RetrieveOptions(top_k=16, window_after=1)
"""What is retrieved beforehand: as in a step of a decode loop, a few of them, and segments."""


class ListRetriever:
    """See PartRetriever. Raises DeviceMemoryFull at creation."""

    keeps_dying = True

    def __init__(self, spec: MemorySpec, shape: ListShape, device: torch.device) -> None:
        centres = Slab(keys_spec(spec, shape.num_generations * shape.num_together), device)
        rows = torch.full((centres.num_cells, shape.width), -1, dtype=torch.int32, device=device)
        self._store = ListStore(shape, centres, rows)
        self._graphs = ListGraphs()

    def put(self, place: int, number: int, layers: Sequence[Lists]) -> None:
        """See PartRetriever."""
        shape, centres, all_rows = self._store.shape, self._store.centres, self._store.rows
        slots = torch.arange(shape.num_together, device=centres.device) + self._slot(number) + place * centres.capacity
        cells = centres.in_all_layers(slots)
        staged = centres.stage(torch.stack([lists.centres for lists in layers]), {})
        centres.write(StagedRows(staged.keys, staged.norms, {}), cells)
        all_rows.index_copy_(0, cells, torch.cat([lists.rows for lists in layers]))
        if all_rows.is_cuda:
            for tensor in (tensor for lists in layers for tensor in lists):
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def copy(self, source: int, target: int, number: int) -> None:
        """See PartRetriever."""
        centres, begin = self._store.centres, self._slot(number)
        end = begin + self._store.shape.num_together
        centres.copy_place(source, target, begin, end - begin)
        rows = self._store.rows.view(centres.num_layers, centres.num_places, centres.capacity, -1)
        rows[:, target, begin:end] = rows[:, source, begin:end]

    def search(self, slab: Slab, batch: SearchBatch, ranges: Ranges) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See PartRetriever."""
        asked, lists, *scanned = self._asked(slab, batch, ranges, batch.groups, None)
        found = launch.found_for(asked)
        num_short = list_launch.search(slab, self._store, asked, lists, scanned, found)
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
        """See PartRetriever. A new CUDA graph takes some milliseconds, and is not made beside a build."""
        runs, graph = runs_of(batch, ranges, slab.capacity), None
        if len(runs) <= 1:
            graph = self._graphs.graph_of(slab, self._store, batch, runs, options, may_be_new=not is_building)
        if graph is not None:
            return graph.retrieve(slab, (batch, self._batch_of_lists(batch, ranges), *runs), groups)
        return self.retrieve_once(slab, batch, ranges, options, groups)

    def retrieve_once(
        self, slab: Slab, batch: SearchBatch, ranges: Ranges, options: RetrieveOptions, groups: NDArray[np.int64]
    ) -> Hits | None:
        """The same, without a graph."""
        asked, lists, *scanned = self._asked(slab, batch, ranges, groups, options)
        found, located = launch.found_for(asked), launch.located_for(asked)
        num_short = list_launch.search(slab, self._store, asked, lists, scanned, found)
        launch.locate(slab, asked, found, located)
        return None if int(num_short) else hits_of(slab, batch, options, found, located)

    def scan_once(self, slab: Slab, batch: SearchBatch, ranges: Ranges) -> None:
        """Searches for nothing in rings of many sizes, for which other kernels are compiled."""
        *_, asked = self._asked(slab, batch, ranges, batch.groups, None)
        scan_many(slab, asked)

    def free(self) -> None:
        """Gives the lists back."""
        self._graphs = ListGraphs()
        self._store.centres.free()
        self._store = replace(self._store, rows=torch.empty(0))

    def _slot(self, number: int) -> int:
        """Of the first list of a generation."""
        return number % self._store.shape.num_generations * self._store.shape.num_together

    def _batch_of_lists(self, batch: SearchBatch, ranges: Ranges) -> SearchBatch:
        """The search for the nearest centres."""
        begins, ends = (ranges.generations * self._store.shape.num_together).T.tolist()
        return replace(batch, begins=tuple(begins), ends=tuple(ends), top_k=self._store.shape.num_chosen)

    def _asked(
        self,
        slab: Slab,
        batch: SearchBatch,
        ranges: Ranges,
        groups: NDArray[np.int64],
        options: RetrieveOptions | None,
    ) -> list[Asked]:
        """The whole, the search for centres, and those of what is scanned. Tables cross to the device in one copy."""
        queries, most_queries = batch.queries.flatten(0, 1).contiguous(), max(batch.counts, default=0)
        runs = runs_of(batch, ranges, slab.capacity)
        lists = self._batch_of_lists(batch, ranges)
        searches = [(slab, batch, launch.num_supers_of(slab, batch.ends))]
        searches += [(self._store.centres, lists, launch.num_supers_of(self._store.centres, lists.ends))]
        searches += [(slab, run, num_supers_of_run(run)) for run in runs]
        shapes = [scan_shape(each.dim, each.keys.dtype, queries.dtype, most_queries) for each, _, _ in searches]
        made = [
            tables(each, some, groups, shape.queries, are_runs=at > 1)
            for at, ((each, some, _), shape) in enumerate(zip(searches, shapes, strict=True))
        ]
        asked = [
            Asked(
                queries=queries,
                tables=of_search,
                sizes=sizes,
                shape=shape,
                top_k=some.top_k,
                num_supers=num_supers,
            )
            for (_, some, num_supers), shape, (sizes, _), of_search in zip(
                searches, shapes, made, in_one_copy(made, slab.device), strict=True
            )
        ]
        if options is not None:
            asked[0] = replace(asked[0], window_before=options.window_before, window=options.window)
        return asked


def warm(spec: MemorySpec, shape: ListShape, device: torch.device) -> None:
    """Retrieves from a few lists, so that what a memory's retrievals need is compiled."""
    small = replace(spec, capacity=WARM_ROWS, num_layers=1, max_sequences=1, payloads=())
    few = replace(shape, span=WARM_ROWS, num_centres=1, num_generations=1)
    slab, lists = Slab(small, device), ListRetriever(small, few, device)
    ranges = Ranges(np.array([[0, 1]]), (np.array([[0, WARM_ROWS]]),))
    for count in WARM_COUNTS:
        batch = SearchBatch(
            queries=torch.zeros((1, count, spec.dim), dtype=spec.dtype, device=device),
            layers=(0,),
            places=(0,),
            counts=(count,),
            begins=(0,),
            ends=(WARM_ROWS,),
            top_k=WARM_OPTIONS.top_k,
        )
        lists.retrieve_once(slab, batch, ranges, WARM_OPTIONS, np.zeros((1, 1), np.int64))
        lists.scan_once(slab, batch, ranges)
