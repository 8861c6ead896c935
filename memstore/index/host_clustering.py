"""k-means on the host in slices of a few milliseconds, between which others get their turn; FAISS finds the nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

CLUSTERING_ROUNDS = 8
"""After so many rounds the centres hardly change."""

SLICE_ELEMENTS = 1 << 26
"""Products of elements of points and centres in a slice: two milliseconds of one thread."""

FEWEST_POINTS, MOST_POINTS = 512, 1024
"""Of a slice. Fewer FAISS compares four times as slowly."""


def clustered(
    faiss: Any, points: NDArray[np.float32], num: int, metric: int, check: Callable[[], None]
) -> NDArray[np.float32]:
    """(num, d) centres of points (n, d), n >= num; of length 1 unless the metric is faiss.METRIC_L2.

    Calls `check` between slices. FAISS uses as many threads as this one has been told to.
    """
    step = len(points) // num
    found = points[: step * num : step].copy()
    for _ in range(CLUSTERING_ROUNDS):
        nearest = flat(faiss, found, metric)
        sums, counts = np.zeros_like(found), np.zeros(num, np.float32)
        for some in slices(points, num):
            check()
            _add(sums, counts, some, nearest.search(some, 1)[1][:, 0])
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


def slices(points: NDArray[np.float32], num: int) -> Iterator[NDArray[np.float32]]:
    """The points, so many at a time that it does not take long to compare them with `num` centres."""
    step = min(max(SLICE_ELEMENTS // (points.shape[1] * num), FEWEST_POINTS), MOST_POINTS)
    for first in range(0, len(points), step):
        yield points[first : first + step]


def _add(
    sums: NDArray[np.float32], counts: NDArray[np.float32], points: NDArray[np.float32], nearest: NDArray[np.int64]
) -> None:
    """Adds points to the sums of their centres, and counts them."""
    order = nearest.argsort()
    centres, firsts, lengths = np.unique(nearest[order], return_index=True, return_counts=True)
    sums[centres] += np.add.reduceat(points[order], firsts, axis=0)
    counts[centres] += lengths
