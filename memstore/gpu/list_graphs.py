"""ListGraphs: retrievals from inverted lists as CUDA graphs, where batches of one shape follow one another."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from memstore.gpu import launch, list_launch
from memstore.gpu.capturing import capturing
from memstore.gpu.launch import Asked
from memstore.gpu.rings import SUPER_SLOTS, AlikeRings, TableSizes
from memstore.gpu.tuning import scan_shape
from memstore.types import CAPTURE_ERRORS, Hits

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from memstore.gpu.list_launch import ListStore
    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import RetrieveOptions

MOST_QUERIES = 64
"""Of one ring."""

MOST_ASKED = 256
"""Queries of a batch, in all rings."""

MOST_ROWS = 16_384
"""Rows that the windows of a batch ask for, repeats counted."""

MOST_GRAPHS = 8
"""Graphs that are kept; the one that was not used for longest goes first."""

RUN_STEPS = (1, 4)
"""Generations that the rows to be scanned may be as many as; more are scanned without a graph."""


class _Kind(NamedTuple):
    """What batches have in common that one graph serves. run_supers: of the rows to be scanned."""

    num_rings: int
    num_queries: int
    run_supers: int
    dtype: torch.dtype
    options: RetrieveOptions


class ListGraphs:
    """The graphs of one memory. For one thread at a time."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[_Kind, _ListGraph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def graph_of(
        self,
        slab: Slab,
        store: ListStore,
        batch: SearchBatch,
        runs: Sequence[SearchBatch],
        options: RetrieveOptions,
        *,
        may_be_new: bool = True,
    ) -> _ListGraph | None:
        """One that serves a batch; None where there is none, and none can or may be made. runs: what is scanned."""
        kind = _kind_of(store, batch, runs, options)
        if kind is None:
            return None
        graph = self._graphs.get(kind)
        if graph is None and may_be_new:
            graph = self._captured(slab, store, kind)
        if graph is not None:
            self._graphs.move_to_end(kind)
        return graph

    def _captured(self, slab: Slab, store: ListStore, kind: _Kind) -> _ListGraph | None:
        """A new graph; None where something else in this process has spoilt the capture, which harms nothing."""
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            graph = self._graphs[kind] = _ListGraph(slab, store, kind)
        except torch.AcceleratorError as error:
            if getattr(error, "error_code", None) not in CAPTURE_ERRORS:
                raise
            return None
        return graph


def _kind_of(
    store: ListStore, batch: SearchBatch, runs: Sequence[SearchBatch], options: RetrieveOptions
) -> _Kind | None:
    """None where no graph is for such a batch, as it is large, or its sequences have not equally many queries."""
    num_queries = batch.queries.shape[0] * batch.queries.shape[1]
    is_alike = len(set(batch.counts)) == 1 and 0 < batch.counts[0] <= MOST_QUERIES
    if not is_alike or num_queries * batch.top_k * options.window > MOST_ROWS:
        return None
    longest = max((end - begin for run in runs for begin, end in zip(run.begins, run.ends, strict=True)), default=0)
    step = next((step for step in RUN_STEPS if longest <= step * store.shape.span), None)
    num_rings = 1 << (len(batch.layers) * len(batch.places) - 1).bit_length()
    if step is None or num_rings * batch.counts[0] > MOST_ASKED:
        return None
    run_supers = -(-step * store.shape.span // SUPER_SLOTS)
    list_supers = launch.num_supers_of(store.centres, (store.centres.capacity,))
    if not launch.has_scratch(num_rings * batch.counts[0], max(run_supers, list_supers)):
        return None
    return _Kind(num_rings, batch.counts[0], run_supers, batch.queries.dtype, options)


class _ListGraph:
    """One captured retrieval and the tensors that it works on. Rings beyond those of a batch see nothing."""

    def __init__(self, slab: Slab, store: ListStore, kind: _Kind) -> None:
        """Raises torch.OutOfMemoryError, and then nothing is kept."""
        self._kind, self._store = kind, store
        sizes = TableSizes(kind.num_rings, kind.num_rings, kind.num_rings * kind.num_queries)
        self._queries = torch.zeros((sizes.num_queries, slab.dim), dtype=kind.dtype, device=slab.device)
        self._tables_on_host = [AlikeRings(sizes) for _ in range(3)]
        self._tables = [tables.flat.to(slab.device) for tables in self._tables_on_host]
        whole = launch.num_supers_of(slab, (slab.capacity,))
        lists = launch.num_supers_of(store.centres, (store.centres.capacity,))
        tops = (kind.options.top_k, store.shape.num_chosen, kind.options.top_k)
        supers = (whole, lists, kind.run_supers)
        self._asked = [
            Asked(
                queries=self._queries,
                tables=sizes.split(table),
                sizes=sizes,
                shape=scan_shape(slab.dim, slab.keys.dtype, kind.dtype, kind.num_queries),
                top_k=top,
                num_supers=num_supers,
            )
            for table, top, num_supers in zip(self._tables, tops, supers, strict=True)
        ]
        options = kind.options
        self._asked[0] = replace(self._asked[0], window_before=options.window_before, window=options.window)
        self._counts = torch.zeros(2, dtype=torch.int64, pin_memory=slab.device.type == "cuda")
        self._found, self._located = launch.found_for(self._asked[0]), launch.located_for(self._asked[0])
        num_rows = len(self._located.positions)
        self._copies = {
            name: torch.empty((num_rows, *slab.array(name).shape[1:]), dtype=slab.array(name).dtype, device=slab.device)
            for name in options.arrays
        }
        self._run(slab)  # what has to be compiled cannot be captured
        self._graph = torch.cuda.CUDAGraph()
        with capturing(self._graph, slab.device):
            self._run(slab)

    def retrieve(self, slab: Slab, batches: Sequence[SearchBatch], groups: NDArray[np.int64]) -> Hits | None:
        """See ListRetriever.retrieve. batches: the whole, the search for centres, what is scanned if anything is."""
        batch, lists, *runs = batches
        order, (of_whole, of_lists, of_run) = groups.reshape(-1), self._tables_on_host
        of_whole.lay(slab, batch, order)
        of_lists.lay(self._store.centres, lists, order)
        of_run.lay(slab, runs[0] if runs else replace(batch, begins=batch.ends), order, are_runs=True)
        num_layers, num_queries, dim = batch.queries.shape
        asked = self._queries[: num_layers * num_queries]
        asked.view(num_layers, num_queries, dim).copy_(batch.queries)
        self._graph.replay()
        located, num_rings, options = self._located, groups.size, self._kind.options
        row_splits = located.row_splits[: num_rings + 1].clone()
        shape = (num_layers, num_queries, batch.top_k)
        index = located.index[: num_layers * num_queries].clone().view(*shape, options.window)
        scores = None if options.omit_scores else self._found.scores[: num_layers * num_queries].clone().view(shape)
        torch.cuda.current_stream(slab.device).synchronize()
        num_rows, num_short = self._counts.tolist()
        if num_short:
            return None
        return Hits(
            row_splits=row_splits,
            positions=located.positions[:num_rows].clone(),
            index=index,
            scores=scores,
            arrays={name: rows[:num_rows].clone() for name, rows in self._copies.items()},
        )

    def _run(self, slab: Slab) -> None:
        for table, on_host in zip(self._tables, self._tables_on_host, strict=True):
            table.copy_(on_host.flat, non_blocking=True)
        asked, lists, scanned = self._asked
        self._found.bitmap.zero_()
        num_short = list_launch.search(slab, self._store, asked, lists, [scanned], self._found)
        launch.locate(slab, asked, self._found, self._located)
        for name, rows in self._copies.items():
            launch.gather(slab, name, self._located, rows)
        self._counts.copy_(torch.cat((self._located.row_splits[-1:], num_short.long())), non_blocking=True)
