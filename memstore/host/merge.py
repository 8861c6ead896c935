"""The hits of each query out of the lists of its pieces, scored from their rows: the one place that makes a score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memstore.host.best import keep_best, offer, put_in_order
from memstore.host.compiling import inlined, kernel
from memstore.host.job import END_RING, FIRST_RING, HEADER, INHERITED, NUM_CUT, PIECE_QUERIES, Job, unpacked
from memstore.host.rings import FIRST_CELL, FIRST_LIST, FIRST_QUERY, NUM_PIECES, NUM_QUERIES, fill, slot_of
from memstore.host.scan import scan, scan_again
from memstore.host.scoring import COSINE, Rows, ask_for, inverse_length, score

if TYPE_CHECKING:
    from numpy.typing import NDArray


@kernel
def find(
    numbers: NDArray[Any],
    bells: NDArray[Any],
    rings: NDArray[Any],
    integers: NDArray[Any],
    floats: NDArray[Any],
    coded: NDArray[Any],
    keys: NDArray[Any],
    norms: NDArray[Any],
    codes: NDArray[Any],
    terms: NDArray[Any],
    queries: NDArray[Any],
    scores: NDArray[Any],
    positions: NDArray[Any],
) -> bool:
    """A whole search in one call: fills rings and the hits, (L, N, k), of those rings that the job is for.

    numbers: see `numbers_of`; bells: of those who help; the rest: see `unpacked`. False if help comes too late.
    """
    integers[:HEADER] = numbers[:HEADER]
    capacity = fill(rings, numbers[HEADER:])
    job = unpacked(integers, floats, coded, keys, norms, codes, terms, queries)
    is_done = scan(job, rings, capacity, bells)
    if is_done:
        _merge(job, rings, capacity, scores, positions)
    return is_done


@kernel
def find_again(
    rings: NDArray[Any],
    capacity: int,
    integers: NDArray[Any],
    floats: NDArray[Any],
    coded: NDArray[Any],
    keys: NDArray[Any],
    norms: NDArray[Any],
    codes: NDArray[Any],
    terms: NDArray[Any],
    queries: NDArray[Any],
    scores: NDArray[Any],
    positions: NDArray[Any],
) -> None:
    """What `find` has not done. integers, floats: copies, to which nobody writes any more."""
    job = unpacked(integers, floats, coded, keys, norms, codes, terms, queries)
    scan_again(job)
    _merge(job, rings, capacity, scores, positions)


@kernel
def rank_all(
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

    numbers: see `numbers_of`, without a header; keys, norms, kind and metric: see Rows; queries: (L, N, dim).
    """
    capacity, rows = fill(rings, numbers), Rows(keys, norms, kind, metric)
    asked = queries.reshape(-1, queries.shape[2])
    all_candidates = candidates.reshape(len(asked), candidates.shape[2])
    all_scores = scores.reshape(len(asked), scores.shape[2])
    all_positions = positions.reshape(len(asked), scores.shape[2])
    for ring in rings:
        for query in range(ring[FIRST_QUERY], ring[FIRST_QUERY] + ring[NUM_QUERIES]):
            hits = all_scores[query], all_positions[query]
            _rank(ring, capacity, rows, asked[query], all_candidates[query], hits)


@inlined
def _merge(job: Job, rings: NDArray[Any], capacity: int, scores: NDArray[Any], positions: NDArray[Any]) -> None:
    """Fills in the hits of the rings that were searched.

    The rows of one query's candidates are on their way from memory while those of the one before are scored.
    """
    _leave_out_inherited(job)
    top_k, most = scores.shape[2], job.lists.scores.shape[1]
    all_scores, all_positions = scores.reshape(-1, top_k), positions.reshape(-1, top_k)
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
                hits = all_scores[before_query], all_positions[before_query]
                candidates = places[1 - turn, :before_count]
                _rank(rings[before], capacity, job.rows, job.queries[before_query], candidates, hits)
            before, before_query, before_count = number, query, count
    if before >= 0:
        hits = all_scores[before_query], all_positions[before_query]
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
