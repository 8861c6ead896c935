"""Search on the host by FAISS, which reads the slab where it lies, one thread to a piece of a ring.

The rings are cut into pieces that a crew of threads takes one after the other, so that a thread which a busy neighbour
holds up takes fewer; FAISS is told to use one thread in each of them, as its own threads wait for each other.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from memstore import ring
from memstore.index.crew import Crew
from memstore.index.host_reader import FEW_QUERIES, Piece, Reader
from memstore.types import Metric

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from memstore.index.base import SearchBatch
    from memstore.slab import Slab

SMALLEST_PIECE = 2048
"""Rows below which handing a piece to a thread costs more than it gains."""

LARGEST_BUFFER = 8 << 20
"""Bytes of float32 rows that a thread converts at a time."""

PIECES_A_THREAD = 4
"""Enough that threads of different speed end together."""


class HostScan:
    """Where FAISS is missing `is_available` is false, and it may not be asked."""

    def __init__(self) -> None:
        self._faiss: Any = None
        with suppress(ImportError):
            import faiss

            self._faiss = faiss
        self._readers: list[Reader] = []
        self._crew = Crew(self._read)

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
            share = _Share(batch.places[sequence], first, end, runs)
            groups.setdefault((end - first, len(runs)), []).append(share)
        for shares in groups.values():
            self._search_alike(slab, batch, candidates, shares)

    def _search_alike(self, slab: Slab, batch: SearchBatch, candidates: torch.Tensor, shares: list[_Share]) -> None:
        """Searches sequences that have equally many queries and pieces."""
        num_queries, width = shares[0].end - shares[0].first, len(shares[0].runs)
        scores = torch.empty(len(batch.layers), len(shares), width, num_queries, batch.top_k)
        positions = torch.empty(scores.shape, dtype=torch.int64)
        pieces = list(_pieces(slab, batch, shares, scores.numpy(), positions.numpy()))
        longest = max(piece.num_rows for piece in pieces)
        with _products_from(self._faiss, num_queries):
            self._crew.do(pieces, torch.get_num_threads(), _expected_s(longest * slab.dim, num_queries))
        found = positions.transpose(2, 3).flatten(3)
        if width > 1:
            # what FAISS has not found it scores worst, so that it loses against anything
            ranked = scores.transpose(2, 3).flatten(3)
            best = ranked.topk(batch.top_k, largest=slab.metric is not Metric.L2, sorted=False)
            found = found.gather(3, best.indices)
        columns = [column for share in shares for column in range(share.first, share.end)]
        candidates[:, torch.tensor(columns)] = found.flatten(1, 2)

    def _read(self, piece: Piece) -> None:
        """Reads one piece in this thread, with one of the readers that no other thread has at the time."""
        reader = self._readers.pop() if self._readers else None
        if reader is None or not reader.fits(piece.slab):
            reader = Reader(self._faiss, piece.slab)
        before = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)  # holds for this thread
        try:
            reader.read(piece)
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
    num_pieces = 1 if num_threads == 1 else max(PIECES_A_THREAD * num_threads // num_rings, 1)
    longest = max(-(-sum(run.length for run in seen) // num_pieces), SMALLEST_PIECE)
    longest = min(longest, max(LARGEST_BUFFER // (4 * slab.dim), 1))
    return [
        ring.Run(run.slot + offset, run.position + offset, min(longest, run.length - offset))
        for run in seen
        for offset in range(0, run.length, longest)
    ]


def _pieces(
    slab: Slab,
    batch: SearchBatch,
    shares: list[_Share],
    scores: NDArray[np.float32],
    positions: NDArray[np.int64],
) -> Iterator[Piece]:
    """Every piece of some sequences. scores, positions: (L, shares, pieces, queries, k)."""
    queries = batch.queries.float().contiguous().numpy()
    for at, layer in enumerate(batch.layers):
        for number, share in enumerate(shares):
            first_cell = (layer * slab.num_places + share.place) * slab.capacity
            mine = queries[at, share.first : share.end]
            for piece, run in enumerate(share.runs):
                out = at, number, piece
                yield Piece(slab, first_cell + run.slot, run.length, run.position, mine, scores[out], positions[out])


def _expected_s(num_elements: int, num_queries: int) -> float:
    """What a core takes for the elements of a piece, about: 10 GB/s where few queries read them, 40 GFLOP/s else."""
    return num_elements * num_queries * (2e-10 if num_queries <= FEW_QUERIES else 5e-11)


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
