"""The windows of hits, and the distinct rows that they ask for, each ring's sorted by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memstore.host.compiling import kernel
from memstore.host.rings import BEGIN, END, FIRST_CELL, FIRST_QUERY, NUM_QUERIES, slot_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

SPARSE = 16
"""Where a ring has so many times more rows than are asked for, sorting them is quicker than to go through the ring."""


@kernel
def expand(
    rings: NDArray[Any],
    groups: NDArray[Any],
    capacity: int,
    before: int,
    hits: NDArray[Any],
    index: NDArray[Any],
    row_splits: NDArray[Any],
    positions: NDArray[Any],
    cells: NDArray[Any],
) -> int:
    """Fills in what hits ask for, and gives the number of rows. groups: (L, S), of each ring.

    hits: (L, N, k) int64 positions, -1 for none. index: (L, N, k, w) int32 into the rows, -1 where masked; row_splits:
    (groups + 1,) int64. positions, cells: int64, with room for as many rows as all windows have.
    """
    num_queries, top_k, window = index.shape[0] * index.shape[1], index.shape[2], index.shape[3]
    all_hits, all_index = hits.reshape(num_queries, top_k), index.reshape(num_queries, top_k, window)
    order = np.empty(len(rings), np.int64)
    for number, group in enumerate(groups.reshape(-1)):
        order[group] = number
    num_rows = 0
    row_splits[0] = 0
    for group in range(len(order)):
        ring = rings[order[group]]
        mine = slice(ring[FIRST_QUERY], ring[FIRST_QUERY] + ring[NUM_QUERIES])
        num_asked = _neighbours(ring, all_hits[mine], before, all_index[mine])
        if num_asked:
            num_found = _distinct(all_index[mine], num_asked, ring[END] - ring[BEGIN], num_rows, positions[num_rows:])
            for row in range(num_rows, num_rows + num_found):
                positions[row] += ring[BEGIN]
                cells[row] = ring[FIRST_CELL] + slot_of(positions[row], capacity)
            num_rows += num_found
        row_splits[group + 1] = num_rows
    return num_rows


@kernel
def gather(rows: NDArray[Any], cells: NDArray[Any], found: NDArray[Any]) -> None:
    """Copies some rows. rows: (cells, bytes) uint8; cells: (U,) int64; found: (U, bytes) uint8."""
    for row in range(len(found)):
        found[row] = rows[cells[row]]


@kernel
def _neighbours(ring: NDArray[Any], hits: NDArray[Any], before: int, index: NDArray[Any]) -> int:
    """Fills `index` with each neighbour's position less the first that is seen, -1 where masked; counts the others."""
    num_asked = 0
    for query in range(len(hits)):
        for hit in range(hits.shape[1]):
            for at in range(index.shape[2]):
                offset = hits[query, hit] - ring[BEGIN] + at - before
                is_seen = hits[query, hit] >= 0 and 0 <= offset < ring[END] - ring[BEGIN]
                index[query, hit, at] = offset if is_seen else -1
                num_asked += is_seen
    return num_asked


@kernel
def _distinct(index: NDArray[Any], num_asked: int, num_seen: int, first: int, found: NDArray[Any]) -> int:
    """Writes the distinct offsets of `index`, ascending, to `found`, and to it where they went, from `first` on."""
    flat = index.reshape(-1)
    if num_seen > SPARSE * num_asked:
        return _distinct_of_few(flat, num_asked, first, found)
    places = np.full(num_seen, -1, np.int32)
    for offset in flat:
        if offset >= 0:
            places[offset] = 0
    num_found = 0
    for offset in range(num_seen):
        if places[offset] == 0:
            places[offset] = first + num_found
            found[num_found] = offset
            num_found += 1
    for at in range(len(flat)):
        if flat[at] >= 0:
            flat[at] = places[flat[at]]
    return num_found


@kernel
def _distinct_of_few(flat: NDArray[Any], num_asked: int, first: int, found: NDArray[Any]) -> int:
    """The same by sorting."""
    asked = np.empty(num_asked, np.int32)
    count = 0
    for offset in flat:
        if offset >= 0:
            asked[count] = offset
            count += 1
    sort(asked)
    num_found = 0
    for offset in asked:
        if num_found == 0 or found[num_found - 1] != offset:
            found[num_found] = offset
            num_found += 1
    for at in range(len(flat)):
        if flat[at] >= 0:
            flat[at] = first + _place_of(flat[at], found[:num_found])
    return num_found


@kernel
def _place_of(value: int, values: NDArray[Any]) -> int:
    """Where a value is among ascending ones."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        if values[middle] <= value:
            low = middle
        else:
            high = middle
    return low


@kernel
def sort(values: NDArray[Any]) -> None:
    """Ascending, by a heap: few lines, compiled in a fraction of the time that numba's own sort takes."""
    length = len(values)
    for root in range(length // 2 - 1, -1, -1):
        _sink(values, root, length)
    for end in range(length - 1, 0, -1):
        values[0], values[end] = values[end], values[0]
        _sink(values, 0, end)


@kernel
def _sink(values: NDArray[Any], root: int, length: int) -> None:
    """Puts the root of a heap, the largest first, in its place."""
    while True:
        child = 2 * root + 1
        if child >= length:
            return
        if child + 1 < length and values[child + 1] > values[child]:
            child += 1
        if values[root] >= values[child]:
            return
        values[root], values[child] = values[child], values[root]
        root = child
