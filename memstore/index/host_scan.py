"""Search on the host by FAISS, which reads the slab where it lies, one thread to a piece of a ring.

The rings are cut into pieces that the threads take one after the other, so that a thread which a busy neighbour holds
up takes fewer; FAISS is told to use one thread in each of them, as its own threads wait for each other. Few queries are
compared with the rows as they are stored, bound by memory bandwidth; for many, a piece is first converted to float32 in
a cache-sized buffer, and FAISS then multiplies matrices.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from memstore import ring
from memstore.index.base import ONE_THREAD
from memstore.types import Metric

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from memstore.index.base import SearchBatch
    from memstore.slab import Slab

FEW_QUERIES = 3
"""Up to so many queries a sequence, reading its rows once for each is faster than a matrix product."""

SMALLEST_PIECE = 2048
"""Rows below which handing a piece to a thread costs more than it gains."""

LARGEST_BUFFER = 8 << 20
"""Bytes of float32 rows that a thread converts at a time."""

PIECES_A_THREAD = 4
"""Enough that threads of different speed end together."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a ring, from `cell` of the slab, and the (n, dim) float32 queries that are compared with it.

    scores (n, k) float32 and positions (n, k) int64 take what is found; -1 where the piece has fewer than k rows.
    """

    cell: int
    num_rows: int
    first_position: int
    queries: NDArray[np.float32]
    scores: NDArray[np.float32]
    positions: NDArray[np.int64]


class HostScan:
    """Where FAISS is missing `is_available` is false, and it may not be asked."""

    def __init__(self) -> None:
        self._faiss: Any = None
        with suppress(ImportError):
            import faiss

            self._faiss = faiss
        self._readers: deque[_Reader] = deque()
        self._pool: ThreadPoolExecutor | None = None

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
        pieces = deque(_pieces(slab, batch, shares, scores.numpy(), positions.numpy()))
        with _products_from(self._faiss, num_queries):
            self._read_all(slab, pieces)
        found = positions.transpose(2, 3).flatten(3)
        if width > 1:
            # what FAISS has not found it scores worst, so that it loses against anything
            ranked = scores.transpose(2, 3).flatten(3)
            best = ranked.topk(batch.top_k, largest=slab.metric is not Metric.L2, sorted=False)
            found = found.gather(3, best.indices)
        columns = [column for share in shares for column in range(share.first, share.end)]
        candidates[:, torch.tensor(columns)] = found.flatten(1, 2)

    def _read_all(self, slab: Slab, pieces: deque[Piece]) -> None:
        """Works off the pieces in this thread and in those of the pool."""
        num_threads = torch.get_num_threads()
        num_helpers = min(num_threads, len(pieces)) - 1
        if num_helpers and self._pool is None:
            self._pool = ThreadPoolExecutor(num_threads - 1, thread_name_prefix="memstore-scan")
        helpers = [self._pool.submit(self._read, slab, pieces) for _ in range(num_helpers) if self._pool]
        self._read(slab, pieces)
        for helper in helpers:
            if not helper.cancel():  # one that no core has begun finds nothing left
                helper.result()

    def _read(self, slab: Slab, pieces: deque[Piece]) -> None:
        """Works off pieces until there are none."""
        reader = _take(self._readers)
        if reader is None or not reader.fits(slab):
            reader = _Reader(self._faiss, slab)
        before = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)  # holds for this thread
        try:
            while (piece := _take(pieces)) is not None:
                reader.read(slab, piece)
        finally:
            self._faiss.omp_set_num_threads(before)
            self._readers.append(reader)


class _Reader:
    """FAISS indexes without rows of their own, pointed at pieces of a slab one after the other; for one thread.

    FAISS has this form for indexes that lie in mapped files: codes that it does not own.
    """

    def __init__(self, faiss: Any, slab: Slab) -> None:
        metric = faiss.METRIC_L2 if slab.metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
        kinds = {torch.float16: faiss.ScalarQuantizer.QT_fp16, torch.bfloat16: faiss.ScalarQuantizer.QT_bf16}
        kind = kinds.get(slab.keys.dtype)
        self._flat = faiss.IndexFlat(slab.dim, metric)
        self._stored = self._flat if kind is None else faiss.IndexScalarQuantizer(slab.dim, kind, metric)
        for index in (self._flat, self._stored):
            index.codes.is_owned = False
        self._pointer = faiss.swig_ptr
        self._kind = (slab.dim, slab.keys.dtype, slab.metric)
        self._buffer = torch.empty((0, slab.dim))

    def fits(self, slab: Slab) -> bool:
        """Whether this slab's rows can be read."""
        return self._kind == (slab.dim, slab.keys.dtype, slab.metric)

    def read(self, slab: Slab, piece: Piece) -> None:
        """Writes the best of one piece."""
        stored = slab.keys.flatten(0, 2)[piece.cell : piece.cell + piece.num_rows]
        is_converted = len(piece.queries) > FEW_QUERIES and self._flat is not self._stored
        if is_converted or slab.metric is Metric.COSINE:
            norms = slab.norms if slab.metric is Metric.COSINE else None
            lengths = None if norms is None else norms.flatten()[piece.cell : piece.cell + piece.num_rows, None]
            index, rows = self._flat, self._converted(stored, lengths)
        else:
            index, rows = self._stored, stored
        codes = rows.view(torch.uint8).numpy().reshape(-1)
        index.codes.c_ptr, index.codes.c_size = self._pointer(codes), codes.size
        index.ntotal = piece.num_rows
        scores, positions = self._pointer(piece.scores), self._pointer(piece.positions)
        num_queries, top_k = piece.scores.shape
        index.search_c(num_queries, self._pointer(piece.queries), top_k, scores, positions)
        piece.positions[piece.positions >= 0] += piece.first_position

    def _converted(self, rows: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Rows in float32, times 1 / |row| for cosine; so few at a time that torch does it in this thread."""
        if len(self._buffer) < len(rows):
            self._buffer = torch.empty(rows.shape)
        converted = self._buffer[: len(rows)]
        step = max(ONE_THREAD // rows.shape[1], 1)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            converted[part].copy_(rows[part])
            if lengths is not None:
                converted[part].mul_(lengths[part])
        return converted


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
                yield Piece(first_cell + run.slot, run.length, run.position, mine, scores[out], positions[out])


def _take(items: deque[Item]) -> Item | None:
    """The next item, or None where there is none; two threads do not get the same one."""
    with suppress(IndexError):
        return items.popleft()
    return None


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
