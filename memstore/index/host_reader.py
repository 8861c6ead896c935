"""Readers: FAISS indexes pointed at pieces of a slab, where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memstore.index.base import ONE_THREAD
from memstore.types import Metric

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from memstore.slab import Slab

FEW_QUERIES = 5
"""Up to so many queries a sequence, reading its rows once for each is faster than a matrix product."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Cells [cell, end) of a slab, and the (n, dim) float32 queries that their rows are compared with.

    scores (n, k) float32 and rows (n, k) int64, counted from `cell`, take what is found; the worst score and -1 where
    there are fewer than k rows. Reading it again writes the same again.
    """

    cell: int
    end: int
    queries: NDArray[np.float32]
    scores: NDArray[np.float32]
    rows: NDArray[np.int64]


class Reader:
    """Two FAISS indexes without rows of their own, pointed at one piece after the other; for one thread at a time.

    FAISS has this form for indexes that lie in mapped files: codes that it does not own. Few queries are compared with
    the rows as they are stored, bound by memory bandwidth; for many, and for cosine, a piece is first converted to
    float32 in a cache-sized buffer; for many, FAISS then multiplies matrices.
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

    def read(self, slab: Slab, pieces: Iterable[Piece]) -> None:
        """Writes the best of each piece. What FAISS finds is copied, as two readers may have the same piece."""
        stored = slab.keys.flatten(0, 2)
        codes = _as_bytes(stored)
        row_bytes = slab.dim * slab.keys.itemsize
        scores, rows = np.empty((0, 0), np.float32), np.empty((0, 0), np.int64)
        for piece in pieces:
            if scores.shape != piece.scores.shape:
                scores, rows = np.empty_like(piece.scores), np.empty_like(piece.rows)
            index, mine = self._stored, codes[piece.cell * row_bytes : piece.end * row_bytes]
            if self._is_converted(slab, piece):
                index, mine = self._flat, _as_bytes(self._converted(slab, stored, piece))
            index.codes.c_ptr, index.codes.c_size = self._pointer(mine), mine.size
            index.ntotal = piece.end - piece.cell
            num_queries, top_k = scores.shape
            out = self._pointer(scores), self._pointer(rows)
            index.search_c(num_queries, self._pointer(piece.queries), top_k, *out)
            piece.scores[:] = scores
            piece.rows[:] = rows

    def _is_converted(self, slab: Slab, piece: Piece) -> bool:
        is_stored_in_full = self._stored is self._flat
        return slab.metric is Metric.COSINE or (len(piece.queries) > FEW_QUERIES and not is_stored_in_full)

    def _converted(self, slab: Slab, stored: torch.Tensor, piece: Piece) -> torch.Tensor:
        """Rows in float32, times 1 / |row| for cosine; so few at a time that torch does it in this thread."""
        num_rows = piece.end - piece.cell
        if len(self._buffer) < num_rows:
            self._buffer = torch.empty(num_rows, slab.dim)
        converted = self._buffer[:num_rows]
        step = max(ONE_THREAD // slab.dim, 1)
        mine = stored[piece.cell : piece.end]
        for out, rows in zip(torch.split(converted, step), torch.split(mine, step), strict=True):
            out.copy_(rows)
        if slab.norms is not None and slab.metric is Metric.COSINE:
            inverse = slab.norms.flatten()[piece.cell : piece.end, None]
            for out, lengths in zip(torch.split(converted, step), torch.split(inverse, step), strict=True):
                out.mul_(lengths)
        return converted


def _as_bytes(rows: torch.Tensor) -> NDArray[np.uint8]:
    flat: NDArray[np.uint8] = rows.view(torch.uint8).numpy().reshape(-1)
    return flat
