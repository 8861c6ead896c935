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
from memstore.host.scoring import COSINE, L2, widen
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
    """Fills the lists of one piece, and raises the bars of its queries. block: (BLOCK, dim) float32 to work in."""
    num_queries = piece[PIECE_QUERIES]
    tile = np.empty((TILE_ROWS, PANEL), np.float32)
    job.lists.counts[piece[PIECE_LIST] : piece[PIECE_LIST] + num_queries] = 0
    for first in range(0, piece[NUM_ROWS], BLOCK):
        length = min(BLOCK, piece[NUM_ROWS] - first)
        widen(job.rows, piece[PIECE_CELL] + first, block[:length])
        for panel in range(num_panels_of(num_queries)):
            _multiply_block(job, piece, first, block[:length], panel, tile)


@kernel
def _multiply_block(
    job: Job, piece: NDArray[Any], first: int, block: NDArray[Any], panel: int, tile: NDArray[Any]
) -> None:
    """Offers the rows of a block, the first of which is row `first` of a piece, to the queries of a panel."""
    before = panel * PANEL
    width = min(PANEL, piece[PIECE_QUERIES] - before)
    query, place = piece[PIECE_QUERY] + before, piece[PIECE_LIST] + before
    bars = job.bars[query : query + width]
    metric, cell, position = job.rows.metric, piece[PIECE_CELL] + first, piece[POSITION] + first
    for group in range(0, len(block), TILE_ROWS):  # beyond the last row are those of before, which nobody looks at
        multiply(block, group, job.panels, piece[PIECE_PANEL] + panel, tile)
        for at in range(min(TILE_ROWS, len(block) - group)):
            row, products = group + at, tile[at, :width]
            if metric == L2:
                is_any = _reaches(np.float32(2), job.rows.norms[cell + row], products, bars)
            elif metric == COSINE:
                is_any = _reaches(job.rows.norms[cell + row], np.float32(0), products, bars)
            else:
                is_any = _reaches(np.float32(1), np.float32(0), products, bars)
            if is_any:
                _offer(job.lists, place, position + row, products, bars)


@kernel
def _reaches(factor: float, less: float, products: NDArray[Any], bars: NDArray[Any]) -> bool:
    """Makes of products what a row is ranked by, without what is the same for all rows; whether any reaches its bar."""
    num_below = 0
    for at in range(len(products)):
        value = factor * products[at] - less
        products[at] = value
        num_below += value < bars[at]  # not so what overflowed
    return num_below < len(products)


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
