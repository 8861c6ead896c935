"""Scores of single rows as they are stored, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from memstore.host.compiling import inlined, kernel
from memstore.host.likeness import ROWS, nearness, nearness_of_one, product, product_of_one
from memstore.host.lowering import AHEAD_BYTES, LINE_BYTES, prefetch, widened
from memstore.types import Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

L2, INNER_PRODUCT, COSINE = 0, 1, 2
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
METRICS = {Metric.L2: L2, Metric.INNER_PRODUCT: INNER_PRODUCT, Metric.COSINE: COSINE}
KINDS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


class Rows(NamedTuple):
    """What is searched. keys: (cells, bytes) uint8, as stored, of one of KINDS; metric: of METRICS.

    norms: (cells,) float32, |row|^2 for l2, 1 / |row| for cosine, of no length otherwise.
    """

    keys: NDArray[np.uint8]
    norms: NDArray[np.float32]
    kind: int
    metric: int


@kernel
def score(rows: Rows, cell: int, query: NDArray[Any], scores: NDArray[Any]) -> None:
    """What the rows from `cell` on are ranked by for one query, (n,) float32, larger for a nearer one; never NaN.

    query: (dim,) float32. For cosine what is given is still to be divided by |query|.
    """
    keys = rows.keys[cell : cell + len(scores)]
    if rows.kind == FLOAT16:
        _compare(keys.view(np.uint16), rows.metric, query, scores)
    elif rows.kind == BFLOAT16:
        _compare(keys.view(np.int16), rows.metric, query, scores)
    else:
        _compare(keys.view(np.float32), rows.metric, query, scores)
    _weigh(rows, cell, scores)


@kernel
def ask_for(rows: Rows, cell: int) -> None:
    """Asks memory for a row."""
    num_bytes = rows.keys.shape[1]
    for line in range(0, num_bytes, LINE_BYTES):
        prefetch(rows.keys, cell * num_bytes + line)


@kernel
def score_wide(wide: NDArray[Any], rows: Rows, cell: int, query: NDArray[Any], scores: NDArray[Any]) -> None:
    """The same where the rows from `cell` on were made float32 before, (n, dim)."""
    _compare(wide, rows.metric, query, scores)
    _weigh(rows, cell, scores)


@kernel
def widen(rows: Rows, cell: int, wide: NDArray[Any]) -> None:
    """The rows from `cell` on in float32, (n, dim)."""
    keys = rows.keys[cell : cell + len(wide)]
    if rows.kind == FLOAT16:
        _widen(keys.view(np.uint16), wide)
    elif rows.kind == BFLOAT16:
        _widen(keys.view(np.int16), wide)
    else:
        _widen(keys.view(np.float32), wide)


@kernel
def _widen(keys: NDArray[Any], wide: NDArray[Any]) -> None:
    num_rows, dim = wide.shape
    for row in range(num_rows):
        ask_ahead(keys, row, 1)
        for at in range(dim):
            wide[row, at] = widened(keys[row, at])


@kernel
def _compare(keys: NDArray[Any], metric: int, query: NDArray[Any], scores: NDArray[Any]) -> None:
    """-|row - query|^2 of each row for l2, else its inner product with the query. keys: (n, dim), see `widened`."""
    in_groups = len(scores) // ROWS * ROWS
    if metric == L2:
        for row in range(0, in_groups, ROWS):
            nearness(keys, row, query, scores)
    else:
        for row in range(0, in_groups, ROWS):
            product(keys, row, query, scores)
    for row in range(in_groups, len(scores)):
        _compare_one(keys, row, metric, query, scores)


@kernel
def _compare_one(keys: NDArray[Any], row: int, metric: int, query: NDArray[Any], scores: NDArray[Any]) -> None:
    if metric == L2:
        nearness_of_one(keys, row, query, scores)
    else:
        product_of_one(keys, row, query, scores)


@inlined
def ask_ahead(keys: NDArray[Any], row: int, num_rows: int) -> None:
    """Asks memory for what will be read AHEAD_BYTES after some rows.

    Not for float32: its rows are so long that the processor does that by itself, and asking would disturb it.
    """
    if keys.itemsize < 4:
        dim, line = keys.shape[1], LINE_BYTES // keys.itemsize
        first = row * dim + AHEAD_BYTES // keys.itemsize
        for element in range(first, first + num_rows * dim, line):
            prefetch(keys, element)


@kernel
def _weigh(rows: Rows, cell: int, scores: NDArray[Any]) -> None:
    """Makes of what `_compare` gives what the rows from `cell` on are ranked by; what overflowed comes last."""
    for row in range(len(scores)):
        if rows.metric == COSINE:
            scores[row] *= rows.norms[cell + row]
        if scores[row] != scores[row]:
            scores[row] = -np.inf


@kernel
def inverse_length(query: NDArray[Any]) -> Any:
    """1 / |query|, 0 for a zero vector."""
    total = np.float32(0)
    for at in range(len(query)):
        total += query[at] * query[at]
    return np.float32(1) / np.sqrt(total) if total > 0 else np.float32(0)
