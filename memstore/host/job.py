"""Job: a search that threads share out piece by piece, as one number: the address of a table that says all of it.

Between two steps of a model the processor has forgotten this program. Then each thing that is done in Python takes tens
of microseconds, in which a thread reads a thousand rows; so does each array that is shown to compiled code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from memstore.codes import NUM_TERMS
from memstore.host.coded import Coded
from memstore.host.compiling import inlined, kernel
from memstore.host.lowering import array_at, pointer
from memstore.host.rings import NUM_COLUMNS
from memstore.host.scoring import Rows
from memstore.host.tiles import PANEL

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADER = 39
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
    NUM_PLACES,  # sizes, as `fill` takes them
    CAPACITY,
    NUM_LAYERS,
    NUM_SEQUENCES,
    ALL_QUERIES,  # those of each layer
    DIM,
    NUM_HITS,  # for each query
    NUM_CELLS,  # and how many of them have norms and codes: all or none
    NUM_NORMS,
    NUM_CODES,
    ROW_BYTES,
    CODE_BYTES,
    NUMBER_BYTES,  # of a query's numbers, see Coded
    KEYS,  # where the arrays lie
    NORMS,
    CODES,
    TERMS,
    FLOATS,
    NUMBERS,
    RINGS,
    QUERIES,  # what each search says anew, from here to the ends of its sequences
    SCORES,
    POSITIONS,
) = range(HEADER)
"""Behind it: of the batch its layers, places, begins, ends, counts and planned lengths; pieces; lists; shifts."""

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


class Asked(NamedTuple):
    """What is looked for where. sizes, numbers: see rings.py; lengths: (S,) int64, as planned; rings: to be filled."""

    sizes: NDArray[np.int64]
    numbers: NDArray[np.int64]
    lengths: NDArray[np.int64]
    rings: NDArray[np.int64]


class Found(NamedTuple):
    """The hits of all queries, to be filled: (Q, k) float32 and int64."""

    scores: NDArray[np.float32]
    positions: NDArray[np.int64]


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


@inlined
def _batch_of(header: NDArray[Any]) -> int:
    """How many numbers a batch has."""
    return header[NUM_LAYERS] + 5 * header[NUM_SEQUENCES]


@kernel
def unpacked(table: int) -> Job:
    """The job of a table."""
    header = array_at(pointer(table), HEADER, np.int64)
    most_pieces, most_lists, top_k = header[MOST_PIECES], header[MOST_LISTS], header[TOP_K]
    num_queries, dim, num_codes = header[ALL_QUERIES], header[DIM], header[NUM_CODES]
    num_coded = num_queries if header[BITS] else 0
    first_piece = HEADER + _batch_of(header)
    first_count = first_piece + most_pieces * PIECE_COLUMNS
    first_position = first_count + most_lists
    first_shift = first_position + most_lists * top_k
    integers = array_at(pointer(table), first_shift + num_coded, np.int64)
    first_score = num_queries + num_coded
    first_panel = first_score + most_lists * top_k
    num_floats = first_panel + header[MOST_PANELS] * dim * PANEL
    floats = array_at(pointer(header[FLOATS]), num_floats, np.float32)
    lists = Lists(
        floats[first_score:first_panel].reshape(most_lists, top_k),
        integers[first_position:first_shift].reshape(most_lists, top_k),
        integers[first_count:first_position],
    )
    rows = Rows(
        array_at(pointer(header[KEYS]), (header[NUM_CELLS], header[ROW_BYTES]), np.uint8),
        array_at(pointer(header[NORMS]), header[NUM_NORMS], np.float32),
        header[KIND],
        header[METRIC],
    )
    coded = Coded(
        header[BITS],
        array_at(pointer(header[CODES]), (num_codes, header[CODE_BYTES]), np.uint8),
        array_at(pointer(header[TERMS]), (num_codes, NUM_TERMS), np.float32),
        array_at(pointer(header[NUMBERS]), (num_coded, header[NUMBER_BYTES]), np.int8),
        floats[num_queries:first_score],
        integers[first_shift:],
    )
    return Job(
        header,
        integers[first_piece:first_count].reshape(most_pieces, PIECE_COLUMNS),
        rows,
        array_at(pointer(header[QUERIES]), (num_queries, dim), np.float32),
        floats[:num_queries],
        lists,
        floats[first_panel:].reshape(header[MOST_PANELS], dim, PANEL),
        coded,
    )


@kernel
def asked_of(table: int) -> Asked:
    """What the job of a table is about."""
    header = array_at(pointer(table), HEADER, np.int64)
    num_sequences, first_piece = header[NUM_SEQUENCES], HEADER + _batch_of(header)
    numbers = array_at(pointer(table), first_piece, np.int64)
    shape = (header[NUM_LAYERS] * num_sequences, NUM_COLUMNS)
    return Asked(
        header[NUM_PLACES : NUM_SEQUENCES + 1],
        numbers[HEADER:],
        numbers[first_piece - num_sequences :],
        array_at(pointer(header[RINGS]), shape, np.int64),
    )


@kernel
def found_of(table: int) -> Found:
    """Where the hits of a table's job are to be written."""
    header = array_at(pointer(table), HEADER, np.int64)
    shape = (header[ALL_QUERIES], header[NUM_HITS])
    return Found(
        array_at(pointer(header[SCORES]), shape, np.float32), array_at(pointer(header[POSITIONS]), shape, np.int64)
    )
