"""Retrieval of the decode loop: equally many queries, few, of every sequence, step after step.

Launching its kernels one by one takes longer than they do. They are launched as one CUDA graph, which is captured when
a batch of its shape first comes and has tensors of its own; replies are copies of them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

from memstore.gpu.capturing import capturing
from memstore.gpu.steady import INDEX, POSITIONS, ROW_SPLITS, SCORES, Kind, SteadySearch
from memstore.types import CAPTURE_ERRORS, Hits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import RetrieveOptions

MOST_GRAPHS = 16
"""Graphs that are kept; the one that was not used for longest goes first."""


class DecodeGraphs:
    """The graphs of one memory. For one thread at a time."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Kind, _Graph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def retrieve(
        self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]
    ) -> Hits | None:
        """See VectorIndex.retrieve. None where no graph can be captured, or none could this time."""
        kind = Kind.of(slab, batch, options)
        if not kind.can_be_captured:
            return None
        graph = self._graphs.get(kind) or self._captured(slab, kind)
        if graph is None:
            return None
        self._graphs.move_to_end(kind)
        return graph.retrieve(slab, batch, groups)

    def _captured(self, slab: Slab, kind: Kind) -> _Graph | None:
        """A new graph; None where something else in this process has spoilt the capture, which harms nothing."""
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            graph = self._graphs[kind] = _Graph(slab, kind)
        except torch.AcceleratorError as error:
            if getattr(error, "error_code", None) not in CAPTURE_ERRORS:
                raise
            return None
        return graph


class _Graph:
    """One captured retrieval. Rings beyond those of a batch see nothing."""

    def __init__(self, slab: Slab, kind: Kind) -> None:
        """Raises torch.OutOfMemoryError, and then nothing is kept."""
        self._search = SteadySearch(slab, kind)
        self._num_rows = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._num_rows_on_host = self._num_rows.numpy()
        self._row_shapes = {name: tuple(slab.array(name).shape[1:]) for name in kind.options.arrays}
        self._graph = torch.cuda.CUDAGraph()
        self._run(slab)  # what has to be compiled cannot be captured
        torch.cuda.current_stream(slab.device).synchronize()
        with capturing(self._graph, slab.device):
            self._run(slab)

    def retrieve(self, slab: Slab, batch: SearchBatch, groups: NDArray[np.int64]) -> Hits:
        """See VectorIndex.retrieve."""
        self._search.lay(slab, batch, groups)
        num_layers, num_queries, dim = batch.queries.shape
        asked = self._search.queries
        if len(asked) != num_layers * num_queries:
            asked = asked[: num_layers * num_queries]
        asked.view(num_layers, num_queries, dim).copy_(batch.queries)
        self._graph.replay()
        flat = self._search.flat.clone()
        torch.cuda.current_stream(slab.device.index).synchronize()
        num_rows, hits = int(self._num_rows_on_host[0]), (num_layers, num_queries, batch.top_k)
        options = self._search.kind.options
        shapes = {ROW_SPLITS: (groups.size + 1,), POSITIONS: (num_rows,), INDEX: (*hits, options.window), SCORES: hits}
        for name in options.arrays:
            shapes[name] = (num_rows, *self._row_shapes[name])
        if options.omit_scores:
            del shapes[SCORES]
        found = self._search.room.begins(flat, shapes)
        return Hits(
            row_splits=found[ROW_SPLITS],
            positions=found[POSITIONS],
            index=found[INDEX],
            scores=found.get(SCORES),
            arrays={name: found[name] for name in options.arrays},
        )

    def _run(self, slab: Slab) -> None:
        self._search.send()
        self._search.launch(slab)
        self._num_rows.copy_(self._search.located.row_splits[-1:], non_blocking=True)
