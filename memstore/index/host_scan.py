"""Search on the host where a sequence has few queries: FAISS reads the rows once, as they are stored, on every core.

Bound by memory bandwidth. The rings are cut into pieces that the threads take one after the other, so that a thread
which a busy neighbour holds up takes fewer. FAISS is told to use one thread in each of them.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from memstore import ring
from memstore.types import Metric

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memstore.index.base import SearchBatch
    from memstore.slab import Slab

FEW_QUERIES = 3
"""Up to so many queries a sequence, reading its rows again for each is faster than a matrix product."""

SMALLEST_PIECE = 2048
"""Rows below which handing a piece to a thread costs more than it gains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a run of slots that one query is compared with. query: (dim,) float32; scores, positions: (k,), out."""

    keys: torch.Tensor
    first_position: int
    query: torch.Tensor
    scores: torch.Tensor
    positions: torch.Tensor


class HostScan:
    """Does nothing where FAISS is missing, nor for cosine, nor on a GPU."""

    def __init__(self) -> None:
        self._faiss: Any = None
        with suppress(ImportError):
            import faiss

            self._faiss = faiss
        self._pool: ThreadPoolExecutor | None = None

    def search(self, slab: Slab, batch: SearchBatch, candidates: torch.Tensor) -> set[int]:
        """Fills in the candidates, (L, N, k), of the sequences that have few queries, and says which they are."""
        if self._faiss is None or slab.device.type != "cpu" or slab.metric is Metric.COSINE:
            return set()
        few = [each for each in batch.sequences() if each[2] - each[1] <= FEW_QUERIES]
        if not few:
            return set()
        num_threads = torch.get_num_threads()
        cuts = [_cut(slab, batch, sequence, num_threads, len(few)) for sequence, _, _ in few]
        columns = torch.cat([torch.arange(first, end) for _, first, end in few])
        width = max(len(cut) for cut in cuts)
        is_l2 = slab.metric is Metric.L2
        scores = torch.full((len(batch.layers), len(columns), width, batch.top_k), torch.inf if is_l2 else -torch.inf)
        positions = torch.full(scores.shape, -1)
        pieces = deque(_pieces(slab, batch, list(zip(few, cuts, strict=True)), scores, positions))
        self._read_all(slab, pieces, num_threads)
        found = positions.flatten(2)
        if width > 1:
            best = scores.flatten(2).topk(batch.top_k, largest=not is_l2, sorted=False).indices
            found = found.gather(2, best)
        candidates[:, columns] = found
        return {sequence for sequence, _, _ in few}

    def _read_all(self, slab: Slab, pieces: deque[Piece], num_threads: int) -> None:
        """Works off the pieces in this thread and in those of the pool."""
        num_helpers = min(num_threads, len(pieces)) - 1
        if num_helpers and self._pool is None:
            self._pool = ThreadPoolExecutor(num_threads - 1, thread_name_prefix="memstore-scan")
        helpers = [self._pool.submit(self._read, slab, pieces) for _ in range(num_helpers) if self._pool]
        self._read(slab, pieces)
        for helper in helpers:
            helper.result()

    def _read(self, slab: Slab, pieces: deque[Piece]) -> None:
        """Works off pieces until there are none."""
        faiss = self._faiss
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # holds for this thread
        try:
            reader = _Reader(faiss, slab)
            while (piece := _take(pieces)) is not None:
                reader.read(piece)
        finally:
            faiss.omp_set_num_threads(before)


def _take(pieces: deque[Piece]) -> Piece | None:
    """The next piece, if another thread has not taken the last one meanwhile."""
    with suppress(IndexError):
        return pieces.popleft()
    return None


class _Reader:
    """A FAISS index without rows of its own, pointed at pieces of a slab one after the other.

    FAISS has this form for indexes that lie in mapped files: codes that it does not own.
    """

    def __init__(self, faiss: Any, slab: Slab) -> None:
        metric = faiss.METRIC_L2 if slab.metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
        if slab.keys.dtype == torch.float32:
            self._index = faiss.IndexFlat(slab.dim, metric)
        else:
            kinds = {torch.float16: faiss.ScalarQuantizer.QT_fp16, torch.bfloat16: faiss.ScalarQuantizer.QT_bf16}
            self._index = faiss.IndexScalarQuantizer(slab.dim, kinds[slab.keys.dtype], metric)
        self._pointer = faiss.swig_ptr
        self._codes = self._index.codes
        self._codes.is_owned = False

    def read(self, piece: Piece) -> None:
        """Writes the best of one piece, unordered beyond what FAISS does; -1 where it has fewer rows than asked."""
        rows = piece.keys.view(torch.uint8).numpy().reshape(-1)
        self._codes.c_ptr, self._codes.c_size = self._pointer(rows), rows.size
        self._index.ntotal = len(piece.keys)
        out = piece.scores.numpy(), piece.positions.numpy()
        self._index.search_c(
            1, self._pointer(piece.query.numpy()), len(out[0]), self._pointer(out[0]), self._pointer(out[1])
        )
        out[1][out[1] >= 0] += piece.first_position


def _cut(slab: Slab, batch: SearchBatch, sequence: int, num_threads: int, num_sequences: int) -> list[ring.Run]:
    """The runs that a sequence sees, cut so that there are about four pieces a thread in all."""
    seen = ring.runs(batch.begins[sequence], batch.ends[sequence], slab.capacity)
    if num_threads == 1:
        return list(seen)
    num_pieces = max(4 * num_threads // (num_sequences * len(batch.layers)), 1)
    longest = max(sum(run.length for run in seen) // num_pieces + 1, SMALLEST_PIECE)
    return [
        ring.Run(run.slot + offset, run.position + offset, min(longest, run.length - offset))
        for run in seen
        for offset in range(0, run.length, longest)
    ]


def _pieces(
    slab: Slab,
    batch: SearchBatch,
    cuts: list[tuple[tuple[int, int, int], list[ring.Run]]],
    scores: torch.Tensor,
    positions: torch.Tensor,
) -> Iterator[Piece]:
    """Every piece of every query; those that read the same rows next to each other. scores: (L, queries, pieces, k)."""
    queries = batch.queries.float()
    for at, layer in enumerate(batch.layers):
        row = 0
        for (sequence, first, end), cut in cuts:
            for number, run in enumerate(cut):
                keys = slab.keys[layer, batch.places[sequence], run.slot : run.slot + run.length]
                for column in range(first, end):
                    mine = (at, row + column - first, number)
                    yield Piece(
                        keys=keys,
                        first_position=run.position,
                        query=queries[at, column],
                        scores=scores[mine],
                        positions=positions[mine],
                    )
            row += end - first
