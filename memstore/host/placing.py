"""Placing: rows that are kept, measured and put where they lie: a compiled call for each array of a slab."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memstore.host.compiling import kernel
from memstore.host.lowering import widened
from memstore.host.scoring import BFLOAT16, COSINE, FLOAT16, KINDS, METRICS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memstore.slab import Slab, StagedRows
    from memstore.types import Metric


def norms_of(keys: torch.Tensor, metric: Metric) -> torch.Tensor:
    """(L, n, dim) as stored -> (L, n) float32, what a slab keeps of them: |row|^2 for l2, 1 / |row| for cosine."""
    norms = np.empty(keys.shape[:2], np.float32)
    measure(_as_rows(keys), KINDS[keys.dtype], METRICS[metric], norms.reshape(-1))
    return torch.from_numpy(norms)


def put(slab: Slab, rows: StagedRows, cells: NDArray[np.int64]) -> None:
    """See Slab.write; the rows have all arrays of the slab."""
    for array, new in zip(slab.cells, rows.arrays, strict=True):
        scatter(array, cells, _as_rows(new))


@kernel
def scatter(rows: NDArray[Any], cells: NDArray[Any], new: NDArray[Any]) -> None:
    """Overwrites some rows. rows: (cells, bytes) uint8; cells: (n,) int64; new: (n, bytes) uint8."""
    for row in range(len(new)):
        rows[cells[row]] = new[row]


@kernel
def measure(keys: NDArray[Any], kind: int, metric: int, norms: NDArray[Any]) -> None:
    """Fills in norms, (n,) float32. keys: (n, bytes) uint8, of one of KINDS; metric: of METRICS."""
    if kind == FLOAT16:
        _measure(keys.view(np.uint16), metric, norms)
    elif kind == BFLOAT16:
        _measure(keys.view(np.int16), metric, norms)
    else:
        _measure(keys.view(np.float32), metric, norms)


@kernel
def _measure(keys: NDArray[Any], metric: int, norms: NDArray[Any]) -> None:
    for row in range(len(norms)):
        total = np.float32(0)
        for at in range(keys.shape[1]):
            element = widened(keys[row, at])
            total += element * element
        if metric == COSINE:
            total = np.float32(1) / np.sqrt(total) if total > 0 else np.float32(0)
        norms[row] = total


def _as_rows(array: torch.Tensor) -> NDArray[np.uint8]:
    """(L, n, ...) -> (L * n, bytes), the same memory."""
    plain = array.view(torch.int16) if array.dtype is torch.bfloat16 else array  # which numpy does not have
    rows: NDArray[Any] = plain.numpy()
    return rows.reshape(rows.shape[0] * rows.shape[1], -1).view(np.uint8)
