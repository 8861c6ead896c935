"""Planning: into which pieces the rings of a search are cut, and who helps."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from memstore.host.tiles import PANEL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memstore.host.scoring import Rows
    from memstore.search import SearchBatch

FEW_QUERIES = 8
"""Up to so many queries a ring, reading its rows once for all of them is quicker than a matrix product."""

SMALLEST_READ, LARGEST_READ = 128 << 10, 1 << 20
"""Bytes of rows of a piece that is read: less is not worth drawing, after more the threads end too far apart."""

FEWEST_MULTIPLIED = 256
"""Rows of a piece that is multiplied."""

PIECES_A_THREAD = 8
WORTH_A_HELPER = 12 << 20
"""Bytes to be read, or sixteenths of products to be made, from which waking a thread takes less than it saves."""

LENGTH_STEP = 256
"""Rows in which the lengths of rings are counted: what is planned for so many is good until there are more."""

LIST_ITEM = 12
LIST_BYTES = 32 << 20
"""Bytes of a candidate, and of all of them; more only where those of one ring need it."""

CANDIDATES_A_HIT = {8: 2, 4: 3, 2: 8}
"""How many of the best of a first pass over codes of so many bits are ranked by their rows, for each hit asked for."""

FEWEST_HITS = 8
"""As many candidates as for so many hits there are at least."""

CODE_BYTES_TO_END = 40
"""The time that it takes to end the product of a row's code and to look at it, in bytes of codes that are read."""

PATIENCE = 200_000
"""Looks at what others have not done, about twice as long as a piece takes, before it is done again."""


def steps_of(num_seen: int) -> int:
    """Steps of LENGTH_STEP that so many rows are, rounded up."""
    return max((num_seen - 1) // LENGTH_STEP + 1, 0)


class Shape(NamedTuple):
    """What a plan depends on, beside the slab: numbers of layers and hits, and of each sequence queries and rows seen.

    lengths: in steps of LENGTH_STEP, rounded up.
    """

    num_layers: int
    top_k: int
    counts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, batch: SearchBatch) -> Shape:
        """That of a batch."""
        pairs = zip(batch.begins, batch.ends, strict=True)
        lengths = tuple([steps_of(end - begin) for begin, end in pairs])
        return cls(len(batch.layers), batch.top_k, batch.counts, lengths)


class Plan(NamedTuple):
    """headers: the first numbers of the jobs, see job.py, that are done one after the other. lengths: see Shape."""

    headers: Sequence[tuple[int, ...]]
    num_helpers: int
    lengths: tuple[int, ...]


class _Room(NamedTuple):
    """What a ring needs."""

    pieces: int
    lists: int
    panels: int


def plan(shape: Shape, rows: Rows, dim: int, num_threads: int, coded: tuple[int, int] = (0, 0)) -> Plan:
    """One job, or several where the candidates of all rings would take too much.

    coded: bits and bytes of a code, where there is a first pass over codes.
    """
    num_layers, top_k, counts, lengths = shape
    bits = coded[0] if any(0 < count <= FEW_QUERIES for count in counts) else 0
    row_bytes = coded[1] + CODE_BYTES_TO_END if bits else rows.keys.shape[1]
    num_candidates = 2 * CANDIDATES_A_HIT[bits] * max(top_k, FEWEST_HITS) if bits else top_k
    rings = [(length * LENGTH_STEP, count) for length, count in zip(lengths, counts, strict=True)]
    work, num_multiplied, least = 0, 0, 0
    for num_seen, count in rings:
        if count > FEW_QUERIES:
            num_multiplied += num_seen
            work += num_seen * count * dim // 16
            least = max(least, num_seen * count * LIST_ITEM * num_candidates // LIST_BYTES)
        elif count:
            work += num_seen * row_bytes
    num_helpers = num_threads - 1 if num_layers * work >= WORTH_A_HELPER else 0
    thread_pieces = PIECES_A_THREAD * (num_helpers + 1)
    read_bytes = min(max(num_layers * work // thread_pieces, SMALLEST_READ), LARGEST_READ)
    # the more queries there are, the fewer pieces have room for their lists
    longest = (
        max(read_bytes // row_bytes, 1),
        max(num_layers * num_multiplied // thread_pieces, least, FEWEST_MULTIPLIED),
    )
    rooms = [_room(num_seen, count, longest) for num_seen, count in rings]
    fixed = num_candidates, rows.kind, rows.metric, bits, FEW_QUERIES, *longest
    spans = _spans(rooms * num_layers, LIST_BYTES // (LIST_ITEM * num_candidates))
    return Plan([(0, 0, *room, *fixed, *span, PATIENCE, 0) for room, span in spans], num_helpers, lengths)


def _room(num_seen: int, num_queries: int, longest: tuple[int, int]) -> _Room:
    if not num_queries:
        return _Room(0, 0, 0)
    is_multiplied = num_queries > FEW_QUERIES
    pieces = num_seen // longest[is_multiplied] + 2  # the seam may cut one more
    return _Room(pieces, pieces * num_queries, -(-num_queries // PANEL) if is_multiplied else 0)


def _spans(rooms: list[_Room], most_lists: int) -> Iterator[tuple[_Room, tuple[int, int]]]:
    """Rings [first, end) whose lists have room together, and what they need."""
    first, pieces, lists, panels = 0, 0, 0, 0
    for ring, room in enumerate(rooms):
        if lists and lists + room.lists > most_lists:
            yield _Room(pieces, lists, panels), (first, ring)
            first, pieces, lists, panels = ring, 0, 0, 0
        pieces, lists, panels = pieces + room.pieces, lists + room.lists, panels + room.panels
    yield _Room(pieces, lists, panels), (first, len(rooms))
