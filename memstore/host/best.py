"""The best of many scores: a list of at most k, the worst of them at its root (a binary heap).

Where k is large that costs too much. There a list has room for twice as many, takes whatever may be among the best, and
is cut to its best k when it is full.

Better is a larger score, or an equal score and a lower position; so what is kept does not depend on the order in which
it came, nor on who searched which rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

    Quickselect: hits are parted at one of them, and then those on the side where the last to be kept is.
    """
    low, high = 0, count - 1
    while low < high and num_kept < count:
        middle = (low + high) // 2
        score, position = scores[middle], positions[middle]
        at, end = low, high
        while at <= end:
            while is_worse(score, position, scores[at], positions[at]):
                at += 1
            while is_worse(scores[end], positions[end], score, position):
                end -= 1
            if at <= end:
                _swap(scores, positions, at, end)
                at += 1
                end -= 1
        if num_kept <= end + 1:
            high = end
        elif num_kept > at:
            low = at
        else:
            break
    return min(count, num_kept)


@kernel
def worst_of(scores: NDArray[Any], count: int) -> Any:
    """The least of the first `count` scores."""
    least = scores[0]
    for at in range(1, count):
        least = min(least, scores[at])
    return least
