"""Job: a search that threads share out piece by piece, as the few plain arguments that it takes to call compiled code.

Between two steps of a model the processor has forgotten this program. Then each thing that is done in Python takes tens
of microseconds, in which a thread reads a thousand rows; so does unpacking a named tuple at the door of compiled code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from memstore.host.coded import Coded
from memstore.host.compiling import kernel
from memstore.host.scoring import Rows
from memstore.host.tiles import PANEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADER = 16
(
    NEXT,  # the next piece to be done
    NUM_CUT,  # pieces that there are
    MOST_PIECES,  # pieces, lists and panels that there is room for
    MOST_LISTS,
    MOST_PANELS,
    TOP_K,  # room of a list: candidates of a query, or twice as many where codes are read
    KIND,  # of KINDS
    METRIC,  # of METRICS
    BITS,  # of the codes of a first pass, 0 for none
    FEW_QUERIES,  # up to so many queries a ring, its rows are read for them; for more they are multiplied
    LONGEST_READ,  # rows of a piece that is read
    LONGEST_MULTIPLIED,  # rows of one that is multiplied
    FIRST_RING,  # rings [first, end) that are searched
    END_RING,
    PATIENCE,  # how often to look at what others have not done
    NUM_LEFT,  # how many of those who help will not look at the job any more
) = range(HEADER)

PIECE_COLUMNS = 9
PIECE_CELL, NUM_ROWS, POSITION, PIECE_QUERY, PIECE_QUERIES, PIECE_LIST, PIECE_PANEL, INHERITED, IS_DONE = range(
    PIECE_COLUMNS
)
"""INHERITED: the first of the lists that those of the piece began as copies of, -1 for none."""


class Lists(NamedTuple):
    """The best of each piece, and of what it inherits, for each of its queries: (T, k), (T, k) and how many of them are
    in use, (T,).
    """

    scores: NDArray[np.float32]
    positions: NDArray[np.int64]
    counts: NDArray[np.int64]


class Job(NamedTuple):
    """What threads share. header: int64; pieces: (P, PIECE_COLUMNS) int64; queries: (Q, dim) float32.

    bars: (Q,) float32, a score that k rows of each query are known to reach. panels: see tiles.py, of the queries of
    rings that have many.
    """

    header: NDArray[np.int64]
    pieces: NDArray[np.int64]
    rows: Rows
    queries: NDArray[np.float32]
    bars: NDArray[np.float32]
    lists: Lists
    panels: NDArray[np.float32]
    coded: Coded


class Scratch(NamedTuple):
    """The arrays of a job that compiled code fills in, header and all, and unpacks again."""

    integers: NDArray[np.int64]
    floats: NDArray[np.float32]
    numbers: NDArray[np.int8]


def empty_job(header: tuple[int, ...], num_queries: int, dim: int) -> Scratch:
    """Room for a job."""
    most_pieces, most_lists, top_k, bits = (header[at] for at in (MOST_PIECES, MOST_LISTS, TOP_K, BITS))
    num_coded = num_queries if bits else 0
    num_integers = HEADER + most_pieces * PIECE_COLUMNS + most_lists * (1 + top_k) + num_coded
    num_floats = num_queries + num_coded + most_lists * top_k + header[MOST_PANELS] * dim * PANEL
    width = -(-dim * bits // 8) * (8 // bits) if bits else dim
    return Scratch(
        np.empty(num_integers, np.int64), np.empty(num_floats, np.float32), np.empty((num_coded, width), np.int8)
    )


def copied(scratch: Scratch, header: tuple[int, ...]) -> Scratch:
    """A job as it is now, while others write to it: where a piece is done in the copy, its lists are whole."""
    first_list = HEADER + header[MOST_PIECES] * PIECE_COLUMNS
    pieces = scratch.integers[:first_list].copy()  # before the lists
    copies = Scratch(scratch.integers.copy(), scratch.floats.copy(), scratch.numbers.copy())
    copies.integers[:first_list] = pieces
    return copies


@kernel
def unpacked(
    integers: NDArray[Any],
    floats: NDArray[Any],
    numbers: NDArray[Any],
    keys: NDArray[Any],
    norms: NDArray[Any],
    codes: NDArray[Any],
    terms: NDArray[Any],
    queries: NDArray[Any],
) -> Job:
    """A job out of its arguments: its scratch; keys and norms as Rows has them, codes and terms as Coded has them.

    queries: (L, N, dim).
    """
    most_pieces, most_lists, top_k = integers[MOST_PIECES], integers[MOST_LISTS], integers[TOP_K]
    asked = queries.reshape(-1, queries.shape[2])
    first_count = HEADER + most_pieces * PIECE_COLUMNS
    first_position = first_count + most_lists
    first_shift = first_position + most_lists * top_k
    first_score = len(asked) + len(numbers)
    first_panel = first_score + most_lists * top_k
    lists = Lists(
        floats[first_score:first_panel].reshape(most_lists, top_k),
        integers[first_position:first_shift].reshape(most_lists, top_k),
        integers[first_count:first_position],
    )
    pieces = integers[HEADER:first_count].reshape(most_pieces, PIECE_COLUMNS)
    rows = Rows(keys, norms, integers[KIND], integers[METRIC])
    panels = floats[first_panel:].reshape(integers[MOST_PANELS], asked.shape[1], PANEL)
    scales, shifts = floats[len(asked) : first_score], integers[first_shift:]
    coded = Coded(integers[BITS], codes, terms, numbers, scales, shifts)
    return Job(integers[:HEADER], pieces, rows, asked, floats[: len(asked)], lists, panels, coded)
