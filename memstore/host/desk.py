"""Desk: the plan of a search and what it is done on, kept for the next search of the same shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from memstore.host import rings as columns
from memstore.host.planning import Shape, plan
from memstore.host.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from memstore.host.table import Stored
    from memstore.search import SearchBatch

KEPT_BYTES = 1 << 20
"""A table that takes more is not kept: the job is so long that making it does not count."""

SHEETS, SHEET_BYTES = 16, 16 << 10
"""So many results are made at once where they are this small: in a forgotten state one takes as long as all of them."""

_HIT_BYTES = 12


class Result(NamedTuple):
    """The hits of a search, (L, N, k), twice the same memory; addresses: of scores and positions."""

    scores: NDArray[np.float32]
    positions: NDArray[np.int64]
    tensors: tuple[torch.Tensor, torch.Tensor]
    addresses: tuple[int, int]


class Desk:
    """Steps of a decode loop find theirs as they have left it: to make it anew would take longer than many a scan.

    num_helpers: for each job. rings: the table of rings, to be filled.
    """

    def __init__(self, batch: SearchBatch, stored: Stored, bits: int) -> None:
        """bits: of a code, where there is a first pass over codes."""
        self.counts, self.top_k, self._num_layers = batch.counts, batch.top_k, len(batch.layers)
        num_layers, num_queries, dim = batch.queries.shape
        self._stored = stored
        coded = bits, stored.codes.shape[1]
        self.plan = plan(Shape.of(batch), stored.rows, dim, torch.get_num_threads(), coded)
        self.num_helpers = self.plan.num_helpers
        self.rings = np.empty((num_layers * len(batch.places), columns.NUM_COLUMNS), np.int64)
        self._hits = num_layers, num_queries, batch.top_k
        self._kept: list[Table] = []
        self._sheets: list[Result] = []
        self._num_asked = 0

    def is_for(self, batch: SearchBatch) -> bool:
        """Whether a batch is of this shape, but for how much its sequences see: that compiled code looks at."""
        return batch.counts == self.counts and batch.top_k == self.top_k and len(batch.layers) == self._num_layers

    def result(self) -> Result:
        """Memory for what is found, which nobody else has."""
        if not self._sheets:
            size = self._hits[0] * self._hits[1] * self._hits[2] * _HIT_BYTES
            num_sheets = SHEETS if self._num_asked and size <= SHEET_BYTES else 1
            self._sheets = [_result(self._hits) for _ in range(num_sheets)]
        self._num_asked += 1
        return self._sheets.pop()

    def tables(self, batch: SearchBatch) -> Iterable[Table]:
        """Of the jobs; not one that a helper may still look at, who has slept through the search before."""
        if self._kept and self._kept[0].is_left(self.num_helpers):
            return self._kept
        return self._new_tables(batch)

    def _new_tables(self, batch: SearchBatch) -> Iterator[Table]:
        self._kept = []
        for header in self.plan.headers:
            table = Table(header, self.plan.lengths, self._stored, batch, self.rings)
            if len(self.plan.headers) == 1 and table.num_bytes <= KEPT_BYTES:
                self._kept = [table]
            yield table


def _result(hits: tuple[int, int, int]) -> Result:
    scores, positions = np.empty(hits, np.float32), np.empty(hits, np.int64)
    tensors = torch.from_numpy(positions), torch.from_numpy(scores)
    if not scores.size:  # torch gives an empty array strides that cannot be viewed
        tensors = tensors[0].new_empty(hits), tensors[1].new_empty(hits)
    return Result(scores, positions, tensors, (scores.ctypes.data, positions.ctypes.data))
