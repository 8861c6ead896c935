"""The best of many scores: a list of at most k, the worst of them at its root (a binary heap).

Where k is large that costs too much. There a list has room for twice as many, takes whatever may be among the best in
the order of positions, and is cut to its best k when it is full.

Better is a larger score, or an equal score and a lower position; so what is kept does not depend on the order in which
it came, nor on who searched which rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memstore.host.compiling import kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray


@kernel
def is_worse(score: float, position: int, other_score: float, other_position: int) -> bool:
    """Whether the first hit comes after the other."""
    return score < other_score or (score == other_score and position > other_position)


@kernel
def _swap(scores: NDArray[Any], positions: NDArray[Any], one: int, other: int) -> None:
    score, position = scores[one], positions[one]
    scores[one], positions[one] = scores[other], positions[other]
    scores[other], positions[other] = score, position


@kernel
def _sink(scores: NDArray[Any], positions: NDArray[Any], length: int) -> None:
    """Puts the root, which may be better than those below it, in its place among the first `length`."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= length:
            return
        right = child + 1
        if right < length and is_worse(scores[right], positions[right], scores[child], positions[child]):
            child = right
        if not is_worse(scores[child], positions[child], scores[at], positions[at]):
            return
        _swap(scores, positions, at, child)
        at = child


@kernel
def offer(scores: NDArray[Any], positions: NDArray[Any], count: int, score: float, position: int) -> int:
    """Keeps a hit if it is among the best so far; gives how many of the lists, (k,), are in use after `count` were."""
    if count < len(scores):
        at = count
        scores[at], positions[at] = score, position
        while at > 0:
            parent = (at - 1) // 2
            if not is_worse(scores[at], positions[at], scores[parent], positions[parent]):
                break
            _swap(scores, positions, at, parent)
            at = parent
        return count + 1
    if is_worse(scores[0], positions[0], score, position):
        scores[0], positions[0] = score, position
        _sink(scores, positions, count)
    return count


@kernel
def put_in_order(scores: NDArray[Any], positions: NDArray[Any], count: int) -> None:
    """Sorts the `count` that are in use, best first."""
    for length in range(count - 1, 0, -1):
        _swap(scores, positions, 0, length)
        _sink(scores, positions, length)


@kernel
def keep_best(scores: NDArray[Any], positions: NDArray[Any], count: int, num_kept: int) -> int:
    """Moves the best `num_kept` of the first `count` hits of a list to its begin; gives how many that are.

    Their positions ascend, and do so afterwards. The score that parts them is looked for by halving the range of
    scores, as whole numbers of the same order: to look at all of them costs less than a few mispredicted branches.
    """
    if count <= num_kept:
        return count
    ranks = np.empty(count, np.int32)
    bits = scores.view(np.int32)
    for at in range(count):
        ranks[at] = bits[at] if bits[at] >= 0 else bits[at] ^ np.int32(0x7FFFFFFF)
    low, high = np.int64(ranks.min()), np.int64(ranks.max()) + 1
    num_above = 0  # those from `high` on, fewer than are kept; from `low` on there are enough
    while high - low > 1:
        middle = (low + high) // 2
        num = _num_from(ranks, middle)
        if num >= num_kept:
            low = middle
        else:
            high, num_above = middle, num
        if num == num_kept:
            break
    num_equal, kept = num_kept - num_above, 0  # of those that are not above, the first
    for at in range(count):
        is_above = ranks[at] >= high
        is_kept = is_above or (ranks[at] >= low and num_equal > 0)
        scores[kept], positions[kept] = scores[at], positions[at]
        kept += is_kept
        num_equal -= is_kept and not is_above
    return kept


@kernel
def _num_from(ranks: NDArray[Any], least: int) -> int:
    num = 0
    for at in range(len(ranks)):
        num += ranks[at] >= least
    return num


@kernel
def worst_of(scores: NDArray[Any], count: int) -> Any:
    """The least of the first `count` scores."""
    least = scores[0]
    for at in range(1, count):
        least = min(least, scores[at])
    return least
