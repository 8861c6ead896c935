"""The hits of each query out of the lists of its pieces, scored from their rows: the one place that makes a score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memstore.host.best import keep_best, offer, put_in_order
from memstore.host.compiling import inlined, kernel
from memstore.host.job import (
    END_RING,
    FIRST_RING,
    INHERITED,
    NEXT,
    NUM_CUT,
    NUM_LEFT,
    PIECE_QUERIES,
    Found,
    Job,
    asked_of,
    found_of,
    unpacked,
)
from memstore.host.rings import (
    FIRST_CELL,
    FIRST_LIST,
    FIRST_QUERY,
    NUM_PIECES,
    NUM_QUERIES,
    are_of_lengths,
    fill,
    slot_of,
)
from memstore.host.scan import ring_bells, scan, scan_again
from memstore.host.scoring import COSINE, Rows, ask_for, inverse_length, score

if TYPE_CHECKING:
    from numpy.typing import NDArray


DONE, LATE, OTHER_LENGTHS = range(3)


@kernel
def find(table: int, bells: NDArray[Any]) -> int:
    """A whole search in one call, by the address of its table: fills rings and the hits of those that the job is for.

    bells: of those who help. Gives LATE where help comes too late, and OTHER_LENGTHS where the table is planned for
    rings that see more or fewer rows: then nothing is done, but who was asked for help is woken.
    """
    job, asked = unpacked(table), asked_of(table)
    job.header[NUM_LEFT] = 0
    capacity = fill(asked.rings, asked.sizes, asked.numbers)
    if not are_of_lengths(asked.rings, asked.lengths):
        job.header[NEXT], job.header[NUM_CUT] = 0, 0
        ring_bells(bells)
        return OTHER_LENGTHS
    if not scan(job, asked.rings, capacity, bells):
        return LATE
    _merge(job, asked.rings, capacity, found_of(table))
    return DONE


@kernel
def find_again(table: int) -> None:
    """What `find` has not done. table: a copy, to which nobody writes any more."""
    job, asked = unpacked(table), asked_of(table)
    scan_again(job)
    _merge(job, asked.rings, asked.sizes[1], found_of(table))


@kernel
def rank_all(
    sizes: NDArray[Any],
    numbers: NDArray[Any],
    rings: NDArray[Any],
    keys: NDArray[Any],
    norms: NDArray[Any],
    kind: int,
    metric: int,
    queries: NDArray[Any],
    candidates: NDArray[Any],
    scores: NDArray[Any],
    positions: NDArray[Any],
) -> None:
    """Fills in the hits, (L, N, k), out of candidates, (L, N, c) positions, -1 for none.

    sizes, numbers: see `fill`; keys, norms, kind and metric: see Rows; queries: (L, N, dim).
    """
    capacity, rows = fill(rings, sizes, numbers), Rows(keys, norms, kind, metric)
    asked = queries.reshape(-1, queries.shape[2])
    all_candidates = candidates.reshape(len(asked), candidates.shape[2])
    all_scores = scores.reshape(len(asked), scores.shape[2])
    all_positions = positions.reshape(len(asked), scores.shape[2])
    for ring in rings:
        for query in range(ring[FIRST_QUERY], ring[FIRST_QUERY] + ring[NUM_QUERIES]):
            hits = all_scores[query], all_positions[query]
            _rank(ring, capacity, rows, asked[query], all_candidates[query], hits)


@inlined
def _merge(job: Job, rings: NDArray[Any], capacity: int, found: Found) -> None:
    """Fills in the hits of the rings that were searched.

    The rows of one query's candidates are on their way from memory while those of the one before are scored.
    """
    _leave_out_inherited(job)
    most = job.lists.scores.shape[1]
    best, places = np.empty(most, np.float32), np.empty((2, most), np.int64)
    before, before_query, before_count, turn = -1, 0, 0, 0
    for number in range(job.header[FIRST_RING], job.header[END_RING]):
        ring = rings[number]
        for at in range(ring[NUM_QUERIES]):
            query, turn = ring[FIRST_QUERY] + at, 1 - turn
            count = _collected(job, ring, at, best, places[turn])
            for place in range(count):
                ask_for(job.rows, ring[FIRST_CELL] + slot_of(places[turn, place], capacity))
            if before >= 0:
                hits = found.scores[before_query], found.positions[before_query]
                candidates = places[1 - turn, :before_count]
                _rank(rings[before], capacity, job.rows, job.queries[before_query], candidates, hits)
            before, before_query, before_count = number, query, count
    if before >= 0:
        hits = found.scores[before_query], found.positions[before_query]
        _rank(rings[before], capacity, job.rows, job.queries[before_query], places[turn, :before_count], hits)


@kernel
def _leave_out_inherited(job: Job) -> None:
    """Empties the lists that others have taken over."""
    for piece in job.pieces[: job.header[NUM_CUT]]:
        if piece[INHERITED] >= 0:
            job.lists.counts[piece[INHERITED] : piece[INHERITED] + piece[PIECE_QUERIES]] = 0


@kernel
def _collected(job: Job, ring: NDArray[Any], at: int, best: NDArray[Any], places: NDArray[Any]) -> int:
    """The best of all lists of query `at` of a ring, in any order: how many; their positions fill the first places."""
    lists, most, count = job.lists, len(places), 0
    for piece in range(ring[NUM_PIECES]):
        place = ring[FIRST_LIST] + piece * ring[NUM_QUERIES] + at
        for hit in range(lists.counts[place]):
            if job.coded.bits:
                if count == most:
                    count = keep_best(best, places, count, most // 2)
                best[count], places[count] = lists.scores[place, hit], lists.positions[place, hit]
                count += 1
            else:
                count = offer(best, places, count, lists.scores[place, hit], lists.positions[place, hit])
    return keep_best(best, places, count, most // 2) if job.coded.bits else count


@kernel
def _rank(
    ring: NDArray[Any], capacity: int, rows: Rows, query: NDArray[Any], candidates: NDArray[Any], hits: Any
) -> None:
    """Fills in hits, (k,) scores and positions, out of positions of a ring: best first, -inf and -1 after the last."""
    scores, positions = hits
    factor = inverse_length(query) if rows.metric == COSINE else np.float32(1)
    count, found = 0, np.empty(1, np.float32)
    for position in candidates:
        if position >= 0:
            score(rows, ring[FIRST_CELL] + slot_of(position, capacity), query, found)
            count = offer(scores, positions, count, found[0] * factor, position)
    put_in_order(scores, positions, count)
    scores[count:], positions[count:] = -np.inf, -1
