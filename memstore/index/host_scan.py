"""Search on the host by FAISS, which reads the slab where it lies, one thread to a piece of a ring.

The rings are cut into pieces that a crew of threads takes one after the other, so that a thread which a busy neighbour
holds up takes fewer; FAISS is told to use one thread in each of them, as its own threads wait for each other.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memstore import ring
from memstore.index.crew import Crew
from memstore.index.host_reader import FEW_QUERIES, Piece, Reader
from memstore.types import Metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from memstore.index.base import SearchBatch
    from memstore.slab import Slab

SMALLEST_PIECE = 2048
"""Rows below which handing a piece to a thread costs more than it gains."""

LARGEST_BUFFER = 16 << 20
"""Bytes of float32 rows that a thread converts at a time."""

PIECES_A_THREAD = 4
"""Enough that threads of different speed end together; for matrix products one, as FAISS begins each piece anew."""


class HostScan:
    """Where FAISS is missing `is_available` is false, and it may not be asked."""

    def __init__(self) -> None:
        self._faiss: Any = None
        with suppress(ImportError):
            import faiss

            self._faiss = faiss
        self._readers: list[Reader] = []
        self._crew = Crew()

    @property
    def is_available(self) -> bool:
        """Whether FAISS is installed."""
        return self._faiss is not None

    def search(self, slab: Slab, batch: SearchBatch, candidates: torch.Tensor) -> None:
        """Fills in the candidates, (L, N, k) int64, of every sequence that sees something."""
        groups: dict[tuple[int, int], list[_Share]] = {}
        sequences = list(batch.sequences())
        for sequence, first, end in sequences:
            runs = _cut(slab, batch, sequence, len(sequences) * len(batch.layers))
            groups.setdefault((end - first, len(runs)), []).append(_Share(batch.places[sequence], first, end, runs))
        for shares in groups.values():
            self._search_alike(slab, batch, candidates, shares)

    def _search_alike(self, slab: Slab, batch: SearchBatch, candidates: torch.Tensor, shares: list[_Share]) -> None:
        """Searches sequences that have equally many queries and pieces."""
        num_queries, width = shares[0].end - shares[0].first, len(shares[0].runs)
        shape = (len(batch.layers), len(shares), width, num_queries, batch.top_k)
        scores, rows = np.empty(shape, np.float32), np.empty(shape, np.int64)
        pieces = list(_pieces(slab, batch, shares, scores, rows))
        patience_s = max(_expected_s(slab, piece) for piece in pieces)
        with _products_from(self._faiss, num_queries):
            self._crew.do(partial(self._read, slab), pieces, torch.get_num_threads(), patience_s)
        firsts = np.array([[run.position for run in share.runs] for share in shares])
        positions = np.where(rows < 0, -1, rows + firsts[:, :, None, None])
        found = torch.from_numpy(positions).transpose(2, 3).flatten(3)
        if width > 1:
            # what FAISS has not found it scores worst, so that it loses against anything
            ranked = torch.from_numpy(scores).transpose(2, 3).flatten(3)
            best = ranked.topk(batch.top_k, largest=slab.metric is not Metric.L2, sorted=False)
            found = found.gather(3, best.indices)
        first, end = shares[0].first, shares[-1].end
        if end - first == num_queries * len(shares):
            candidates[:, first:end] = found.flatten(1, 2)
            return
        for number, share in enumerate(shares):
            candidates[:, share.first : share.end] = found[:, number]

    def _read(self, slab: Slab, pieces: Iterable[Piece]) -> None:
        """Reads pieces in this thread, with a reader that no other thread has at the time."""
        reader = self._readers.pop() if self._readers else None
        if reader is None or not reader.fits(slab):
            reader = Reader(self._faiss, slab)
        before = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)  # holds for this thread
        try:
            reader.read(slab, pieces)
        finally:
            self._faiss.omp_set_num_threads(before)
            self._readers.append(reader)


@dataclass(frozen=True, slots=True)
class _Share:
    """What one sequence takes part with: its place, its queries [first, end), and the runs that they see, cut."""

    place: int
    first: int
    end: int
    runs: list[ring.Run]


def _cut(slab: Slab, batch: SearchBatch, sequence: int, num_rings: int) -> list[ring.Run]:
    """The runs that a sequence sees, cut so that there are some pieces a thread in all, and none is too large."""
    seen = ring.runs(batch.begins[sequence], batch.ends[sequence], slab.capacity)
    num_threads = torch.get_num_threads()
    per_thread = PIECES_A_THREAD if batch.counts[sequence] <= FEW_QUERIES else 1
    num_pieces = 1 if num_threads == 1 else max(per_thread * num_threads // num_rings, 1)
    longest = max(-(-sum(run.length for run in seen) // num_pieces), SMALLEST_PIECE)
    longest = min(longest, max(LARGEST_BUFFER // (4 * slab.dim), 1))
    return [
        ring.Run(run.slot + offset, run.position + offset, min(longest, run.length - offset))
        for run in seen
        for offset in range(0, run.length, longest)
    ]


def _pieces(
    slab: Slab, batch: SearchBatch, shares: list[_Share], scores: NDArray[np.float32], rows: NDArray[np.int64]
) -> Iterator[Piece]:
    """Every piece of some sequences. scores, rows: (L, shares, pieces, queries, k)."""
    queries = batch.queries.float().contiguous().numpy()
    for at, layer in enumerate(batch.layers):
        for number, share in enumerate(shares):
            first_cell = (layer * slab.num_places + share.place) * slab.capacity
            mine = queries[at, share.first : share.end]
            for piece, run in enumerate(share.runs):
                cell, out = first_cell + run.slot, (at, number, piece)
                yield Piece(cell, cell + run.length, mine, scores[out], rows[out])


def _expected_s(slab: Slab, piece: Piece) -> float:
    """What a core takes for a piece, about: 10 GB/s of float16 where few queries read the rows, else 40 GFLOP/s."""
    num_products = (piece.end - piece.cell) * slab.dim * len(piece.queries)
    return num_products * (2e-10 if len(piece.queries) <= FEW_QUERIES else 5e-11)


@contextmanager
def _products_from(faiss: Any, num_queries: int) -> Iterator[None]:
    """Has FAISS multiply matrices for so many queries, if they are not few; left alone it scans up to 128,000 / dim.

    The setting is one for the whole process; what was set before holds again afterwards.
    """
    before = faiss.cvar.distance_compute_blas_threshold
    if num_queries > FEW_QUERIES:
        faiss.cvar.distance_compute_blas_threshold = 0
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
