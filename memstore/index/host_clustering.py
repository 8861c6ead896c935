"""k-means on the host in slices of about a millisecond, between which others get their turn.

The nearest centres of wide points are found by FAISS's matrix products, those of narrow ones by compiled code.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from numpy.typing import NDArray

CLUSTERING_ROUNDS = 8
"""After so many rounds the centres hardly change."""

SLICE_POINTS = 512
"""Points that are compared at a time. Fewer FAISS compares four times as slowly."""

SLICE_CENTRES = 256
"""Centres that they are compared with at a time: with 256 elements each, a millisecond of one thread."""


NARROW, NARROW_POINTS = 32, 2048
"""Elements up to which points are narrow, as those that product codes are learnt from, and how many come at a time
where there are no more centres than SLICE_CENTRES; else fewer.
"""


class Centres:
    """Centres of which the nearest is found."""

    def __init__(self, faiss: Any, centres: NDArray[np.float32], metric: int) -> None:
        """centres: (num, d) float32, copied. metric: of FAISS."""
        self._is_l2 = metric == faiss.METRIC_L2
        blocks = (centres[first : first + SLICE_CENTRES] for first in range(0, len(centres), SLICE_CENTRES))
        self._blocks = [flat(faiss, block, metric) for block in blocks]

    def nearest(self, points: NDArray[np.float32], check: Callable[[], None]) -> NDArray[np.int64]:
        """(n,) which centre is the nearest to each of a slice of points (n, d). Calls `check` before each piece."""
        best, found = np.full(len(points), np.inf, np.float32), np.zeros(len(points), np.int64)
        for number, block in enumerate(self._blocks):
            check()
            distances, ids = block.search(points, 1)
            distance = distances[:, 0] if self._is_l2 else -distances[:, 0]
            is_nearer = distance < best
            best = np.where(is_nearer, distance, best)
            found = np.where(is_nearer, ids[:, 0] + number * SLICE_CENTRES, found)
        return found


def clustered(
    faiss: Any, points: NDArray[np.float32], num: int, metric: int, check: Callable[[], None]
) -> NDArray[np.float32]:
    """(num, d) centres of points (n, d), n >= num; of length 1 unless the metric is faiss.METRIC_L2.

    Calls `check` between slices, and last. FAISS uses as many threads as this one has been told to.
    """
    step = len(points) // num
    found = points[: step * num : step].copy()
    compiled = _grouping()
    narrow = compiled if metric == faiss.METRIC_L2 and points.shape[1] <= NARROW else None
    add_to = _add_to if compiled is None else compiled.add_to
    for _ in range(CLUSTERING_ROUNDS):
        sums, counts = np.zeros_like(found), np.zeros(num, np.float32)
        if narrow is not None:
            turned = np.ascontiguousarray(found.T)
            for some in slices(points, max(NARROW_POINTS * SLICE_CENTRES // max(num, SLICE_CENTRES), 1)):
                check()
                narrow.add_to_nearest(some, turned, sums, counts)
        else:
            centres = Centres(faiss, found, metric)
            for some in slices(points):
                add_to(centres.nearest(some, check), some, sums, counts)
        check()
        means = sums / np.maximum(counts, 1)[:, None]
        if metric != faiss.METRIC_L2:
            means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-30)
        found = np.where(counts[:, None] > 0, means, found)
    return found


def flat(faiss: Any, centres: NDArray[np.float32], metric: int) -> Any:
    """Finds the nearest of them."""
    index = faiss.IndexFlat(centres.shape[1], metric)
    index.add(centres)
    return index


def slices(points: NDArray[np.float32], step: int = SLICE_POINTS) -> Iterator[NDArray[np.float32]]:
    """The points, so many at a time that it does not take long to compare them with a slice of centres."""
    for first in range(0, len(points), step):
        yield points[first : first + step]


@cache
def _grouping() -> ModuleType | None:
    """None where numba cannot be used."""
    try:
        from memstore.host import grouping
    except ImportError:
        return None
    return grouping


def _add_to(
    nearest: NDArray[np.int64], points: NDArray[np.float32], sums: NDArray[np.float32], counts: NDArray[np.float32]
) -> None:
    """Adds points to the sums of their centres, and counts them."""
    order = nearest.argsort()
    centres, firsts, lengths = np.unique(nearest[order], return_index=True, return_counts=True)
    sums[centres] += np.add.reduceat(points[order], firsts, axis=0)
    counts[centres] += lengths
