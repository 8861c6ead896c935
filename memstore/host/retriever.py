"""HostRetriever: exact search and retrieval on the host, a few compiled calls a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from memstore.codes import BITS, NUM_TERMS
from memstore.host import rings as columns
from memstore.host.desk import Desk
from memstore.host.helpers import Helpers
from memstore.host.job import copied
from memstore.host.merge import find, find_again, rank_all
from memstore.host.planning import Shape
from memstore.host.scan import help_scan
from memstore.host.scoring import KINDS, METRICS, Rows
from memstore.host.windows import expand, gather
from memstore.slab import as_cells
from memstore.types import KEY, Hits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import RetrieveOptions


class _Found(NamedTuple):
    """rings: see rings.py; scores, positions: (L, N, k)."""

    rings: NDArray[np.int64]
    scores: NDArray[np.float32]
    positions: NDArray[np.int64]


class _View:
    """A slab's memory as compiled code reads it."""

    def __init__(self, slab: Slab) -> None:
        self.keys = slab.keys
        norms = np.empty(0, np.float32) if slab.norms is None else slab.norms.flatten().numpy()
        self._arrays = {KEY: slab.keys, **slab.payloads}
        self._bytes = {name: as_cells(array) for name, array in self._arrays.items()}
        self.rows = Rows(self._bytes[KEY], norms, KINDS[slab.keys.dtype], METRICS[slab.metric])
        self.code_terms = _codes_of(slab)
        self._coded = BITS[slab.first_pass], self.code_terms[0].shape[1]
        self._desk: Desk | None = None

    def desk(self, batch: SearchBatch) -> Desk:
        """That of the last batch, if it was of the same shape."""
        shape = Shape.of(batch)
        if self._desk is None or self._desk.shape != shape:
            self._desk = Desk(shape, batch, self.rows, self._coded)
        return self._desk

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
        self._last_view: _View | None = None

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See VectorIndex.search."""
        found = self._find(self._view(slab), slab, batch)
        return _tensor(found.positions), _tensor(found.scores)

    def retrieve(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]) -> Hits:
        """See VectorIndex.retrieve."""
        view = self._view(slab)
        found = self._find(view, slab, batch)
        index = np.empty((*found.positions.shape, options.window), np.int32)
        row_splits = np.empty(len(found.rings) + 1, np.int64)
        positions, cells = np.empty(index.size, np.int64), np.empty(index.size, np.int64)
        asked = found.rings, groups, slab.capacity, options.window_before, found.positions
        num_rows = expand(*asked, index, row_splits, positions, cells)
        return Hits(
            row_splits=_tensor(row_splits),
            positions=_tensor(positions[:num_rows]),
            index=_tensor(index),
            scores=None if options.omit_scores else _tensor(found.scores),
            arrays={name: view.gathered(name, cells[:num_rows]) for name in options.arrays},
        )

    def close(self) -> None:
        """Lets go of the slab that was searched last, and of the helpers."""
        self._last_view, self._helpers = None, Helpers()

    def _view(self, slab: Slab) -> _View:
        """The view of a slab, kept until another is asked for."""
        if self._last_view is None or self._last_view.keys is not slab.keys:
            self._last_view = _View(slab)
        return self._last_view

    def _find(self, view: _View, slab: Slab, batch: SearchBatch) -> _Found:
        """The best of each query."""
        queries, desk = _queries(batch), view.desk(batch)
        hits = (*queries.shape[:2], batch.top_k)
        found = _Found(desk.rings, np.empty(hits, np.float32), np.empty(hits, np.int64))
        for header in desk.headers:
            numbers = columns.numbers_of(header, slab, batch)
            scratch = desk.scratch(header)
            job = *scratch, view.rows.keys, view.rows.norms, *view.code_terms, queries
            bells = self._helpers.tell(desk.num_helpers, help_scan, *job)
            if not find(numbers, bells, found.rings, *job, found.scores, found.positions):
                copies = copied(scratch, header)
                find_again(found.rings, slab.capacity, *copies, *job[3:], found.scores, found.positions)
        return found


def _codes_of(slab: Slab) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes and terms of all cells; none where the slab has none."""
    if slab.codes is None or slab.terms is None:
        return np.empty((0, 0), np.uint8), np.empty((0, NUM_TERMS), np.float32)
    return slab.codes.flatten(0, 2).numpy(), slab.terms.flatten(0, 2).numpy()


def rank(slab: Slab, batch: SearchBatch, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See index/ranking.py."""
    rows, shape = _View(slab).rows, (*candidates.shape,)
    scores, positions = np.empty(shape, np.float32), np.empty(shape, np.int64)
    rings = np.empty((len(batch.layers) * len(batch.places), columns.NUM_COLUMNS), np.int64)
    asked = rows.keys, rows.norms, rows.kind, rows.metric, _queries(batch), candidates.contiguous().numpy()
    rank_all(columns.numbers_of((), slab, batch), rings, *asked, scores, positions)
    return _tensor(positions), _tensor(scores)


def _queries(batch: SearchBatch) -> NDArray[np.float32]:
    """(L, N, dim)."""
    asked = batch.queries if batch.queries.dtype == torch.float32 else batch.queries.float()
    return np.ascontiguousarray(asked.numpy())


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """The same memory; torch gives an empty array strides that cannot be viewed."""
    tensor = torch.from_numpy(array)
    return tensor if array.size else tensor.new_empty(tensor.shape)
