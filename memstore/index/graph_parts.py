"""Parts on a GPU: graphs, after CAGRA (arXiv 2308.15136), built by exact search, piece by piece.

FAISS's would be built in one piece, which asks the device for memory and gives it back all the time, and be searched
one generation after the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore import ring
from memstore.errors import InvalidRequest
from memstore.gpu.graphing import Graph
from memstore.index.build_stream import BuildStream
from memstore.index.settings import CHUNK_ROWS, graph_shape
from memstore.index.stored_rows import random_rows
from memstore.search import SearchBatch
from memstore.types import RetrieveOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.index.generation import RowSource
    from memstore.types import MemorySpec

WARM_COUNTS, WARM_OPTIONS = (1, 64, 512), RetrieveOptions(top_k=16, window_after=1)
"""What is retrieved beforehand: as in a step of a decode loop, a few of them, and segments."""


class GraphBuilder:
    """See PartBuilder; its parts are Graphs, which a GraphRetriever walks. Raises InvalidRequest without Triton."""

    can_mask = True

    def __init__(self, spec: MemorySpec, device: torch.device) -> None:
        try:
            from memstore.gpu import linking
        except ImportError as error:
            raise InvalidRequest("spec.index", f"{spec.index.value} needs Triton, which is not here") from error
        self._linking = linking
        self._spec = spec
        self._shape = graph_shape(spec)
        self._device = device
        self._stream = BuildStream(device)

    def candidates(self, top_k: int) -> int:
        """Rows are scored as they are."""
        return top_k

    def prepare(self) -> None:
        """Builds and walks a graph of random rows, so that every kernel is loaded and working memory is there."""
        from memstore.gpu.graphs import GraphRetriever
        from memstore.gpu.ranges import Ranges

        shape, spec = replace(self._shape, num_generations=1), replace(self._spec, num_layers=1, max_sequences=1)
        rows = random_rows(spec, self._device, min(shape.span, CHUNK_ROWS))
        with self._stream.at_work():
            self._linking.prepare(rows.slab, self._linking.num_nearest(shape.num_links), shape.span)
        graph = self.build(rows, lambda: None)
        retriever, ranges = GraphRetriever(spec, shape, self._device), Ranges(np.array([[0, 1]]), ())
        retriever.put(0, 0, [graph])
        for count in WARM_COUNTS:
            batch = SearchBatch(
                queries=torch.zeros((1, count, spec.dim), dtype=spec.dtype, device=self._device),
                layers=(0,),
                places=(0,),
                counts=(count,),
                begins=(0,),
                ends=(len(rows),),
                top_k=WARM_OPTIONS.top_k,
            )
            retriever.retrieve(rows.slab, batch, ranges, WARM_OPTIONS, np.zeros((1, 1), np.int64))
            retriever.scan_once(rows.slab, batch, ranges)

    def build(self, rows: RowSource, check: Callable[[], None]) -> Graph:
        """On a stream of its own, which is never far ahead of the device."""

        def wait() -> None:
            self._stream.wait()
            check()

        with self._stream.at_work():
            num = self._linking.num_nearest(self._shape.num_links)
            of = (rows.first, rows.end)
            nearest = self._linking.nearest_rows(rows.slab, rows.layer, rows.place, of, num, wait)
            links = self._linking.linked(nearest, self._shape.num_links, wait)
            entries = self._entries(rows)
            wait()
            return Graph(links, entries, rows.first % self._shape.span)

    def _entries(self, rows: RowSource) -> torch.Tensor:
        """The rows that walks may begin at."""
        shape, keys = self._shape, rows.slab.keys[rows.layer, rows.place]
        positions = torch.arange(shape.num_entries, device=keys.device) * shape.stride
        positions += rows.first - rows.first % shape.span
        found = keys.index_select(0, ring.slot_of(positions, len(keys)))
        return found.masked_fill(((positions < rows.first) | (positions >= rows.end))[:, None], shape.nowhere)
