"""Scan: rows are read once, as they are stored; for few queries a ring at the bandwidth of memory.

The rings are cut into pieces, which threads draw from one counter. A piece has a list for the best of each of its
queries. A thread that has lost its core holds nobody up: whoever waits does the piece again, into a list of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memstore.host.best import keep_best, offer, worst_of
from memstore.host.coded import code_query, score_codes
from memstore.host.compiling import inlined, kernel
from memstore.host.job import (
    END_RING,
    FEW_QUERIES,
    FIRST_RING,
    INHERITED,
    IS_DONE,
    LONGEST_MULTIPLIED,
    LONGEST_READ,
    MOST_LISTS,
    MOST_PIECES,
    NEXT,
    NUM_CUT,
    NUM_LEFT,
    NUM_ROWS,
    PATIENCE,
    PIECE_CELL,
    PIECE_LIST,
    PIECE_PANEL,
    PIECE_QUERIES,
    PIECE_QUERY,
    POSITION,
    Job,
    unpacked,
)
from memstore.host.lowering import draw, raised, ring_bell
from memstore.host.products import BLOCK, multiply_piece, num_panels_of, pack
from memstore.host.rings import BEGIN, END, FIRST_CELL, FIRST_LIST, FIRST_QUERY, NUM_PIECES, NUM_QUERIES, slot_of
from memstore.host.scoring import score, score_wide, widen

if TYPE_CHECKING:
    from numpy.typing import NDArray


@inlined
def scan(job: Job, rings: NDArray[Any], capacity: int, bells: NDArray[Any]) -> bool:
    """Does a job, with the help of those whose bells are rung; False where they have not done their part in time."""
    job.bars[:] = -np.inf
    cut(job, rings, capacity)
    pack(job, rings)
    for query in range(len(job.coded.numbers)):
        code_query(job.coded, query, job.queries[query])
    ring_bells(bells)
    _draw_pieces(job)
    patience = job.header[PATIENCE]
    for number in range(job.header[NUM_CUT]):
        while not raised(job.pieces[number], IS_DONE):
            patience -= 1
            if patience < 0:
                return False
    return True


@inlined
def ring_bells(bells: NDArray[Any]) -> None:
    """Wakes those who help."""
    for bell in bells:
        ring_bell(bell)


@kernel
def help_scan(table: int) -> None:
    """Does pieces of the job of a table until none is left to begin."""
    job = unpacked(table)
    _draw_pieces(job)
    draw(job.header, NUM_LEFT)


@inlined
def scan_again(job: Job) -> None:
    """Does all pieces that are not done."""
    block = _block_of(job)
    for number in range(job.header[NUM_CUT]):
        if not raised(job.pieces[number], IS_DONE):
            _begin(job, number, -1)
            _do(job, job.pieces[number], block)


@inlined
def _draw_pieces(job: Job) -> None:
    block = _block_of(job)
    before = -1
    while True:
        number = draw(job.header, NEXT)
        if number >= job.header[NUM_CUT]:
            return
        _begin(job, number, before)
        _do(job, job.pieces[number], block)
        draw(job.pieces[number], IS_DONE)
        before = number


@kernel
def _block_of(job: Job) -> NDArray[Any]:
    """Memory to work in, (BLOCK, dim) float32; none where all pieces have one query, which takes none."""
    is_used = job.header[MOST_LISTS] > job.header[MOST_PIECES]
    return np.empty((BLOCK if is_used else 0, job.queries.shape[1]), np.float32)


@kernel
def _begin(job: Job, number: int, before: int) -> None:
    """The lists that a piece begins with: those of the piece that this thread has done before, if of the same queries.

    So what is known to be good raises the bar, and of each thread only the last lists are merged. Lists of codes are in
    the order of positions, which that of threads is not: they begin empty.
    """
    piece, lists = job.pieces[number], job.lists
    mine = slice(piece[PIECE_LIST], piece[PIECE_LIST] + piece[PIECE_QUERIES])
    if before < 0 or job.pieces[before, PIECE_QUERY] != piece[PIECE_QUERY] or job.coded.bits:
        lists.counts[mine], piece[INHERITED] = 0, -1
        return
    first = job.pieces[before, PIECE_LIST]
    old = slice(first, first + piece[PIECE_QUERIES])
    lists.scores[mine], lists.positions[mine], lists.counts[mine] = (
        lists.scores[old],
        lists.positions[old],
        lists.counts[old],
    )
    piece[INHERITED] = first


@inlined
def _do(job: Job, piece: NDArray[Any], block: NDArray[Any]) -> None:
    """Offers the rows of one piece to its lists. block: (BLOCK, dim) float32 to work in."""
    if piece[PIECE_QUERIES] > job.header[FEW_QUERIES]:
        multiply_piece(job, piece, block)
    else:
        _scan_piece(job, piece, block)


@kernel
def cut(job: Job, rings: NDArray[Any], capacity: int) -> None:
    """Cuts rings into pieces, oldest rows first. Fills in FIRST_LIST and NUM_PIECES of the rings."""
    num_pieces, num_lists, num_panels = 0, 0, 0
    for number in range(job.header[FIRST_RING], job.header[END_RING]):
        ring = rings[number]
        ring[FIRST_LIST], ring[NUM_PIECES] = num_lists, 0
        is_multiplied = ring[NUM_QUERIES] > job.header[FEW_QUERIES]
        longest = job.header[LONGEST_MULTIPLIED if is_multiplied else LONGEST_READ]
        position = ring[BEGIN]
        while position < ring[END] and ring[NUM_QUERIES] > 0:
            slot = slot_of(position, capacity)
            num_rows = min(longest, ring[END] - position, capacity - slot)
            piece = job.pieces[num_pieces]
            piece[PIECE_CELL], piece[NUM_ROWS], piece[POSITION] = ring[FIRST_CELL] + slot, num_rows, position
            piece[PIECE_QUERY], piece[PIECE_QUERIES] = ring[FIRST_QUERY], ring[NUM_QUERIES]
            piece[PIECE_LIST], piece[PIECE_PANEL], piece[IS_DONE] = num_lists, num_panels, 0
            num_pieces += 1
            num_lists += ring[NUM_QUERIES]
            ring[NUM_PIECES] += 1
            position += num_rows
        if is_multiplied:
            num_panels += num_panels_of(ring[NUM_QUERIES])
    job.header[NEXT], job.header[NUM_CUT] = 0, num_pieces


@kernel
def _scan_piece(job: Job, piece: NDArray[Any], block: NDArray[Any]) -> None:
    """By reading its rows, once for all queries."""
    rows, lists, num_queries = job.rows, job.lists, piece[PIECE_QUERIES]
    is_widened = num_queries > 1 and not job.coded.bits
    scores, products = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int32)
    for first in range(0, piece[NUM_ROWS], BLOCK):
        cell, length = piece[PIECE_CELL] + first, min(BLOCK, piece[NUM_ROWS] - first)
        some, position = scores[:length], piece[POSITION] + first
        if is_widened:
            widen(rows, cell, block[:length])
        for at in range(num_queries):
            query, place = piece[PIECE_QUERY] + at, piece[PIECE_LIST] + at
            best, places, count = lists.scores[place], lists.positions[place], lists.counts[place]
            if job.coded.bits:
                score_codes(job.coded, cell, query, products[:length], some)
                lists.counts[place] = _collect(best, places, count, position, some, job.bars[query : query + 1])
                continue
            if is_widened:
                score_wide(block[:length], rows, cell, job.queries[query], some)
            else:
                score(rows, cell, job.queries[query], some)
            lists.counts[place] = _offer_all(best, places, count, position, some, job.bars[query])
    for at in range(num_queries):
        query, place = piece[PIECE_QUERY] + at, piece[PIECE_LIST] + at
        best, places, count = lists.scores[place], lists.positions[place], lists.counts[place]
        if job.coded.bits:
            lists.counts[place] = _cut_to_best(best, places, count, job.bars[query : query + 1])
        elif count == len(best):
            job.bars[query] = max(job.bars[query], best[0])


# What is called once a block is given no more than it needs: each array is seven arguments.


@kernel
def _offer_all(
    best: NDArray[Any], places: NDArray[Any], count: int, position: int, scores: NDArray[Any], bar: float
) -> int:
    """Offers rows, the first of which is that of `position`, to a list, unless there are known to be k better ones.

    best, places: (k,), a list of which `count` are in use; gives how many are then.
    """
    if count == len(best):
        bar = max(bar, best[0])
    for row in range(len(scores)):
        if scores[row] >= bar:
            count = offer(best, places, count, scores[row], position + row)
            if count == len(best):
                bar = max(bar, best[0])
    return count


@kernel
def _collect(
    best: NDArray[Any], places: NDArray[Any], count: int, position: int, scores: NDArray[Any], bars: NDArray[Any]
) -> int:
    """The same with a list that has room for twice as many as are kept of it, see best.py. bars: (1,), of its query."""
    bar = bars[0]
    for row in range(len(scores)):
        if scores[row] >= bar:
            best[count], places[count] = scores[row], position + row
            count += 1
            if count == len(best):
                count = _cut_to_best(best, places, count, bars)
                bar = bars[0]
    return count


@kernel
def _cut_to_best(best: NDArray[Any], places: NDArray[Any], count: int, bars: NDArray[Any]) -> int:
    """Leaves of a list with room for twice as many the half that is best, and raises the bar of its query to them."""
    num_kept = len(best) // 2
    count = keep_best(best, places, count, num_kept)
    if count == num_kept:
        bars[0] = max(bars[0], worst_of(best, count))
    return count
