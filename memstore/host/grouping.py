"""Grouping: points added to the sums of the centres that they are nearest to, a round of k-means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memstore.host.compiling import kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray


@kernel
def add_to_nearest(points: NDArray[Any], turned: NDArray[Any], sums: NDArray[Any], counts: NDArray[Any]) -> None:
    """Adds each point to the sum of its nearest centre by distance, the first of several, and counts it there.

    points: (n, d); turned: (d, num), the centres element by element; sums: (num, d); counts: (num,); all float32.
    """
    distances = np.empty(turned.shape[1], np.float32)
    ranks = distances.view(np.int32)  # whole numbers of the same order, as none is negative: these are compared at once
    for row in range(len(points)):
        distances[:] = 0
        for at in range(points.shape[1]):
            element = points[row, at]
            for centre in range(len(distances)):
                apart = element - turned[at, centre]
                distances[centre] += apart * apart
        least, nearest = np.int32(0x7FFFFFFF), np.int32(len(ranks) - 1)
        for centre in range(len(ranks)):
            least = min(least, ranks[centre])
        for centre in range(len(ranks)):
            nearest = min(nearest, np.int32(centre) if ranks[centre] == least else nearest)
        sums[nearest] += points[row]
        counts[nearest] += 1


@kernel
def add_to(nearest: NDArray[Any], points: NDArray[Any], sums: NDArray[Any], counts: NDArray[Any]) -> None:
    """The same where it is known which centre is the nearest to each point, (n,) int64."""
    for row in range(len(points)):
        sums[nearest[row]] += points[row]
        counts[nearest[row]] += 1
