"""Readers: FAISS indexes pointed at pieces of a slab, where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memstore.index.base import ONE_THREAD
from memstore.types import Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memstore.slab import Slab

FEW_QUERIES = 3
"""Up to so many queries a sequence, reading its rows once for each is faster than a matrix product."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a ring, from `cell` of the slab, and the (n, dim) float32 queries that are compared with it.

    scores (n, k) float32 and positions (n, k) int64 take what is found, -1 where the piece has fewer than k rows;
    reading it again writes the same again.
    """

    slab: Slab
    cell: int
    num_rows: int
    first_position: int
    queries: NDArray[np.float32]
    scores: NDArray[np.float32]
    positions: NDArray[np.int64]


class Reader:
    """Two FAISS indexes without rows of their own, pointed at one piece after the other; for one thread at a time.

    FAISS has this form for indexes that lie in mapped files: codes that it does not own. Few queries are compared with
    the rows as they are stored, bound by memory bandwidth; for many, a piece is first converted to float32 in a
    cache-sized buffer, and FAISS then multiplies matrices.
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

    def read(self, piece: Piece) -> None:
        """Writes the best of one piece."""
        slab = piece.slab
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
        num_queries, top_k = piece.scores.shape
        scores, slots = np.empty_like(piece.scores), np.empty_like(piece.positions)
        index.search_c(num_queries, self._pointer(piece.queries), top_k, self._pointer(scores), self._pointer(slots))
        piece.scores[:] = scores
        piece.positions[:] = np.where(slots < 0, -1, slots + piece.first_position)

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
