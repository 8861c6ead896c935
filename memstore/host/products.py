"""Many queries a ring: products of a block of rows with all of them, while the block lies in a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memstore.host.best import offer
from memstore.host.compiling import kernel
from memstore.host.job import (
    END_RING,
    FEW_QUERIES,
    FIRST_RING,
    NUM_ROWS,
    PIECE_CELL,
    PIECE_LIST,
    PIECE_PANEL,
    PIECE_QUERIES,
    PIECE_QUERY,
    POSITION,
    Job,
    Lists,
)
from memstore.host.rings import FIRST_QUERY, NUM_QUERIES
from memstore.host.scoring import COSINE, L2, Rows, widen
from memstore.host.tiles import PANEL, TILE_ROWS, multiply

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 128
"""Rows that are looked at together: so few that they stay in a cache."""


@kernel
def num_panels_of(num_queries: int) -> int:
    """Panels of so many queries; the last one may be partly filled."""
    return (num_queries + PANEL - 1) // PANEL


@kernel
def pack(job: Job, rings: NDArray[Any]) -> None:
    """Fills the panels with the queries of rings that have many, ring by ring, zeros beside the last."""
    panel = 0
    for number in range(job.header[FIRST_RING], job.header[END_RING]):
        num_queries = rings[number, NUM_QUERIES]
        if num_queries <= job.header[FEW_QUERIES]:
            continue
        for query in range(num_panels_of(num_queries) * PANEL):
            into = job.panels[panel + query // PANEL, :, query % PANEL]
            if query < num_queries:
                into[:] = job.queries[rings[number, FIRST_QUERY] + query]
            else:
                into[:] = 0
        panel += num_panels_of(num_queries)


@kernel
def multiply_piece(job: Job, piece: NDArray[Any], block: NDArray[Any]) -> None:
    """Offers the rows of one piece to its lists, and raises bars. block: (BLOCK, dim) float32 to work in."""
    num_queries = piece[PIECE_QUERIES]
    tile, weights = np.empty((TILE_ROWS, PANEL), np.float32), np.empty((BLOCK, 2), np.float32)
    for first in range(0, piece[NUM_ROWS], BLOCK):
        cell, length = piece[PIECE_CELL] + first, min(BLOCK, piece[NUM_ROWS] - first)
        widen(job.rows, cell, block[:length])
        _weigh(job.rows, cell, weights[:length])
        for panel in range(num_panels_of(num_queries)):
            _multiply_block(job, piece, first, block[:length], weights, panel, tile)


@kernel
def _weigh(rows: Rows, cell: int, weights: NDArray[Any]) -> None:
    """How rows from `cell` on are ranked, without what is the same for all of them: see `multiply`."""
    for row in range(len(weights)):
        if rows.metric == L2:
            weights[row, 0], weights[row, 1] = 2, rows.norms[cell + row]
        else:
            weights[row, 0], weights[row, 1] = rows.norms[cell + row] if rows.metric == COSINE else 1, 0


@kernel
def _multiply_block(
    job: Job,
    piece: NDArray[Any],
    first: int,
    block: NDArray[Any],
    weights: NDArray[Any],
    panel: int,
    tile: NDArray[Any],
) -> None:
    """Offers the rows of a block, the first of which is row `first` of a piece, to the queries of a panel."""
    before = panel * PANEL
    width = min(PANEL, piece[PIECE_QUERIES] - before)
    query, place = piece[PIECE_QUERY] + before, piece[PIECE_LIST] + before
    bars, position = job.bars[query : query + width], piece[POSITION] + first
    for group in range(0, len(block), TILE_ROWS):  # beyond the last row are those of before, which nobody looks at
        reached = multiply(block, group, weights, job.panels, piece[PIECE_PANEL] + panel, bars, tile)
        if reached:
            for at in range(min(TILE_ROWS, len(block) - group)):
                if reached >> at & 1:
                    _offer(job.lists, place, position + group + at, tile[at, :width], bars)


@kernel
def _offer(lists: Lists, place: int, position: int, scores: NDArray[Any], bars: NDArray[Any]) -> None:
    """Offers a row to the lists from `place` on, and raises bars."""
    for at in range(len(scores)):
        if scores[at] < bars[at]:
            continue
        best, places = lists.scores[place + at], lists.positions[place + at]
        worst_last = scores[at] if scores[at] == scores[at] else np.float32(-np.inf)
        count = offer(best, places, lists.counts[place + at], worst_last, position)
        lists.counts[place + at] = count
        if count == len(best):
            bars[at] = max(bars[at], best[0])
