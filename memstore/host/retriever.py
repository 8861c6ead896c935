"""HostRetriever: exact search and retrieval on the host, a few compiled calls a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from memstore.codes import BITS, NUM_TERMS
from memstore.host import rings as columns
from memstore.host.desk import Desk
from memstore.host.helpers import Helpers
from memstore.host.merge import LATE, OTHER_LENGTHS, find, rank_all
from memstore.host.scoring import KINDS, METRICS, Rows
from memstore.host.table import Stored
from memstore.host.windows import expand, gather
from memstore.slab import as_cells
from memstore.types import KEY, Hits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memstore.host.desk import Result
    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import RetrieveOptions


class _Found(NamedTuple):
    """rings: see rings.py; hits: see desk.py."""

    rings: NDArray[np.int64]
    hits: Result


class View:
    """A slab's memory as compiled code reads it."""

    def __init__(self, slab: Slab) -> None:
        self.keys = slab.keys
        norms = np.empty(0, np.float32) if slab.norms is None else slab.norms.flatten().numpy()
        self._arrays = {KEY: slab.keys, **slab.payloads}
        self._bytes = {name: as_cells(array) for name, array in self._arrays.items()}
        self.rows = Rows(self._bytes[KEY], norms, KINDS[slab.keys.dtype], METRICS[slab.metric])
        self._stored = Stored(self.rows, *_codes_of(slab), slab.num_places, slab.capacity)
        self._bits = BITS[slab.first_pass]
        self._desk: Desk | None = None

    def desk(self, batch: SearchBatch) -> Desk:
        """That of the last batch, if it was of the same shape."""
        if self._desk is None or not self._desk.is_for(batch):
            self._desk = Desk(batch, self._stored, self._bits)
        return self._desk

    def clear_desk(self) -> None:
        """The next batch is planned anew."""
        self._desk = None

    def gathered(self, name: str, cells: NDArray[np.int64]) -> torch.Tensor:
        """Rows of the keys or a payload."""
        rows, array = self._bytes[name], self._arrays[name]
        found = np.empty((len(cells), rows.shape[1]), np.uint8)
        gather(rows, cells, found)
        return _tensor(found).view(array.dtype).view(len(cells), *array.shape[3:])


class HostRetriever:
    """For one thread at a time."""

    def __init__(self) -> None:
        self._helpers = Helpers()
        self._last_view: View | None = None

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See VectorIndex.search."""
        return self._find(self._view(slab), batch).hits.tensors

    def retrieve(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]) -> Hits:
        """See VectorIndex.retrieve."""
        view = self._view(slab)
        rings, hits = self._find(view, batch)
        index = np.empty((*hits.positions.shape, options.window), np.int32)
        row_splits = np.empty(len(rings) + 1, np.int64)
        positions, cells = np.empty(index.size, np.int64), np.empty(index.size, np.int64)
        asked = rings, groups, slab.capacity, options.window_before, hits.positions
        num_rows = expand(*asked, index, row_splits, positions, cells)
        return Hits(
            row_splits=_tensor(row_splits),
            positions=_tensor(positions[:num_rows]),
            index=_tensor(index),
            scores=None if options.omit_scores else hits.tensors[1],
            arrays={name: view.gathered(name, cells[:num_rows]) for name in options.arrays},
        )

    def close(self) -> None:
        """Lets go of the slab that was searched last, and of the helpers."""
        self._last_view, self._helpers = None, Helpers()

    def _view(self, slab: Slab) -> View:
        """The view of a slab, kept until another is asked for."""
        if self._last_view is None or self._last_view.keys is not slab.keys:
            self._last_view = View(slab)
        return self._last_view

    def _find(self, view: View, batch: SearchBatch) -> _Found:
        """The best of each query."""
        queries, desk = _queries(batch), view.desk(batch)
        hits = desk.result()
        for table in desk.tables(batch):
            table.begin(batch, queries.data_ptr(), *hits.addresses)
            bells = self._helpers.tell(desk.num_helpers, table.help, queries)
            outcome = find(table.address, bells)
            if outcome == OTHER_LENGTHS:
                view.clear_desk()
                return self._find(view, batch)
            if outcome == LATE:
                table.finish()
        return _Found(desk.rings, hits)


def _codes_of(slab: Slab) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes and terms of all cells; none where the slab has none."""
    if slab.codes is None or slab.terms is None:
        return np.empty((0, 0), np.uint8), np.empty((0, NUM_TERMS), np.float32)
    return slab.codes.flatten(0, 2).numpy(), slab.terms.flatten(0, 2).numpy()


def rank(slab: Slab, batch: SearchBatch, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See index/ranking.py."""
    rows, shape = View(slab).rows, (*candidates.shape,)
    scores, positions = np.empty(shape, np.float32), np.empty(shape, np.int64)
    rings = np.empty((len(batch.layers) * len(batch.places), columns.NUM_COLUMNS), np.int64)
    sizes = np.array((slab.num_places, slab.capacity, len(batch.layers), len(batch.places)), np.int64)
    numbers = np.array((*batch.layers, *batch.places, *batch.begins, *batch.ends, *batch.counts), np.int64)
    asked = rows.keys, rows.norms, rows.kind, rows.metric, _queries(batch).numpy(), candidates.contiguous().numpy()
    rank_all(sizes, numbers, rings, *asked, scores, positions)
    return _tensor(positions), _tensor(scores)


def _queries(batch: SearchBatch) -> torch.Tensor:
    """(L, N, dim) float32, one behind the other."""
    queries = batch.queries
    if queries.dtype is not torch.float32:
        queries = queries.float()
    return queries if queries.is_contiguous() else queries.contiguous()


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """The same memory; torch gives an empty array strides that cannot be viewed."""
    tensor = torch.from_numpy(array)
    return tensor if array.size else tensor.new_empty(tensor.shape)
