"""One retrieval as kernel launches: a fixed number of them, however many sequences, layers and queries there are.

Only where the maxima of all queries are more than the scratch allows are the queries done in several pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from memstore.gpu.coded import num_leaves
from memstore.gpu.kernels.rows import count_kernel, gather_kernel, locate_kernel
from memstore.gpu.kernels.select import choose_kernel, finish_kernel, score_kernel
from memstore.gpu.launcher import can_chain, start
from memstore.gpu.maxima import LEAVES_OF_SUPER, METRICS, Maxima, Piece, maxima_of
from memstore.gpu.rings import FANOUT, SUPER_SLOTS, WORDS_OF_SUPER, Block
from memstore.gpu.tuning import ceil_div, power_of_two

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memstore.gpu.rings import Tables, TableSizes
    from memstore.gpu.tuning import ScanShape
    from memstore.slab import Slab

COUNT_BLOCK, LOCATE_BLOCK, CHOOSE_BLOCK = 4096, 512, 256
GATHER_BLOCK, GATHER_WIDTH = 4096, 256
WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)
SCRATCH_BYTES = 1 << 30
"""What the maxima of a batch may take, or those of one block of queries where they are more."""

SUPER_BYTES = 4 * (LEAVES_OF_SUPER + 1)
"""The maxima of a super, for each query."""

FEW_QUERIES = 512
"""Up to so many, a query's rows are scored by several programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is searched for: (Q, dim) queries on the device, the tables of their batch, and how it is gone about.

    is_coded: whether codes are read first, see gpu/coded.py.
    """

    queries: torch.Tensor
    tables: Tables
    sizes: TableSizes
    shape: ScanShape
    top_k: int
    num_supers: int
    window_before: int = 0
    window: int = 0
    is_coded: bool = False

    @property
    def top(self) -> int:
        """top_k, or the next power of two, as kernels count it."""
        return max(power_of_two(self.top_k), 2)


class Found(NamedTuple):
    """offsets: (Q, k) int32 from the first position that is seen, -1 for none; scores: (Q, k) float32, -inf there.

    bitmap: (R, words) int32, a bit for each offset that is in a window; 0 at first.
    """

    offsets: torch.Tensor
    scores: torch.Tensor
    bitmap: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """The rows of a reply: row_splits (R + 1,) int64, index (Q, k, w) int32; positions and cells int64.

    The latter have room for as many rows as all windows have; those in use come first. ticket: (1,) int32 of 0.
    """

    row_splits: torch.Tensor
    index: torch.Tensor
    positions: torch.Tensor
    cells: torch.Tensor
    ticket: torch.Tensor


def num_supers_of(slab: Slab, ends: tuple[int, ...]) -> int:
    """Supers that have slots which anything was written to."""
    return max(-(-min(max(ends, default=0), slab.capacity) // SUPER_SLOTS), 1)


def found_for(asked: Asked) -> Found:
    """Room for what `search` finds."""
    device, num_queries = asked.queries.device, asked.sizes.num_queries
    num_words = asked.num_supers * WORDS_OF_SUPER if asked.window else 0
    return Found(
        offsets=torch.empty((num_queries, asked.top_k), dtype=torch.int32, device=device),
        scores=torch.empty((num_queries, asked.top_k), device=device),
        bitmap=torch.zeros((asked.sizes.num_rings, num_words), dtype=torch.int32, device=device),
    )


def located_for(asked: Asked) -> Located:
    """Room for what `locate` fills in."""
    device = asked.queries.device
    index = torch.empty((asked.sizes.num_queries, asked.top_k, asked.window), dtype=torch.int32, device=device)
    return Located(
        row_splits=torch.empty(asked.sizes.num_rings + 1, dtype=torch.int64, device=device),
        index=index,
        positions=torch.empty(index.numel(), dtype=torch.int64, device=device),
        cells=torch.empty(index.numel(), dtype=torch.int64, device=device),
        ticket=torch.zeros(1, dtype=torch.int32, device=device),
    )


def search(slab: Slab, asked: Asked, found: Found, *, is_clearing: bool = False) -> None:
    """Fills `found`. is_clearing: where its bitmap is not 0 at first; every ring must have queries then."""
    if not asked.sizes.num_queries:
        return
    for piece in _pieces(asked):
        maxima = maxima_of(slab, asked, piece, found.bitmap if is_clearing else None)
        _select(slab, asked, piece, maxima, found)


def score(slab: Slab, asked: Asked) -> Scored:
    """The first half of `search`, for few queries: the rows that the hits are among, and their scores."""
    piece = Piece(0, asked.sizes.num_blocks, 0, asked.sizes.num_queries)
    return _scored(slab, asked, piece, maxima_of(slab, asked, piece, None))


def locate(slab: Slab, asked: Asked, found: Found, located: Located) -> None:
    """Fills `located` from what was found."""
    num_words = asked.num_supers * WORDS_OF_SUPER
    is_chained = can_chain(slab.device)
    before_word = torch.empty_like(found.bitmap)
    counts = torch.empty_like(located.row_splits)
    start(
        count_kernel,
        (asked.sizes.num_rings,),
        asked.tables.rings,
        found.bitmap,
        before_word,
        counts,
        located.row_splits,
        located.ticket,
        asked.sizes.num_rings,
        num_words,
        BLOCK=COUNT_BLOCK,
        num_warps=8,
        is_chained=is_chained,
    )
    if not located.index.numel():
        return
    start(
        locate_kernel,
        (ceil_div(located.index.numel(), LOCATE_BLOCK),),
        asked.tables.rings,
        asked.tables.query_rings,
        found.offsets,
        found.bitmap,
        before_word,
        located.row_splits,
        located.index,
        located.positions,
        located.cells,
        num_words,
        located.index.numel(),
        slab.capacity,
        asked.top_k,
        asked.window_before,
        asked.window,
        BLOCK=LOCATE_BLOCK,
        is_chained=is_chained,
    )


def gather(slab: Slab, name: str, located: Located, target: torch.Tensor) -> None:
    """Copies as many of the located rows as the reply has, at most as many as `target` has room for."""
    source, to = in_words(slab.array(name), target)
    num_words = source[0].numel()
    width = min(power_of_two(num_words), GATHER_WIDTH)
    num_rows = GATHER_BLOCK // width
    if not target.numel():
        return
    start(
        gather_kernel,
        (ceil_div(len(target), num_rows),),
        source,
        located.cells,
        located.row_splits,
        to,
        len(located.row_splits) - 1,
        WORDS=num_words,
        BLOCK_R=num_rows,
        BLOCK_W=width,
        is_chained=can_chain(slab.device),
    )


def in_words(*arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same rows as integers, as few of them as there can be."""
    word = next(word for word in WORDS if arrays[0][0].nbytes % word.itemsize == 0)
    return tuple((array.flatten(1) if array.dim() > 1 else array).view(word) for array in arrays)


class Scored(NamedTuple):
    """chosen: (queries, n) int32, the leaves of each query; scores: (queries, n * 8) float32, of their rows."""

    chosen: torch.Tensor
    scores: torch.Tensor

    @property
    def num_leaves(self) -> int:
        """Of a query."""
        return self.chosen.shape[1]


def _select(slab: Slab, asked: Asked, piece: Piece, maxima: Maxima, found: Found) -> None:
    scored = _scored(slab, asked, piece, maxima)
    start(
        finish_kernel,
        (piece.num_queries,),
        asked.tables.rings,
        asked.tables.query_rings,
        scored.chosen,
        scored.scores,
        found.offsets,
        found.scores,
        found.bitmap,
        asked.num_supers,
        slab.capacity,
        piece.first_query,
        asked.top_k,
        asked.window_before,
        asked.window,
        LEAVES=scored.num_leaves,
        TOP=asked.top,
        num_warps=1 if scored.num_leaves <= 32 else 4,
        is_chained=can_chain(slab.device),
    )


def _scored(slab: Slab, asked: Asked, piece: Piece, maxima: Maxima) -> Scored:
    """The leaves that the best rows are in, and what their rows score."""
    num_queries, is_chained = piece.num_queries, can_chain(slab.device)
    top = power_of_two(num_leaves(slab, asked.top_k)) if asked.is_coded else asked.top
    chosen = torch.empty((num_queries, top), dtype=torch.int32, device=slab.device)
    scores = torch.empty((num_queries, top * FANOUT), device=slab.device)
    tables = (asked.tables.rings, asked.tables.query_rings)
    block = max(min(power_of_two(asked.num_supers), CHOOSE_BLOCK), top)
    start(
        choose_kernel,
        (num_queries,),
        *tables,
        *maxima,
        chosen,
        asked.num_supers,
        slab.capacity,
        piece.first_query,
        TOP=top,
        BLOCK_S=block,
        IS_ONE_BLOCK=asked.num_supers <= block,
        num_warps=1 if top <= 32 else 4,
        is_chained=is_chained,
    )
    each = min(top, 2 if num_queries <= FEW_QUERIES else 8)
    start(
        score_kernel,
        (num_queries, top // each),
        asked.queries,
        slab.keys,
        maxima.leaves if slab.norms is None else slab.norms,
        *tables,
        chosen,
        scores,
        slab.num_cells,
        piece.first_query,
        DIM=slab.dim,
        METRIC=METRICS[slab.metric],
        TOP=top,
        LEAVES=each,
        BLOCK_D=min(512 // each, max(power_of_two(slab.dim), 16)),
        is_chained=is_chained,
    )
    return Scored(chosen, scores)


def is_at_once(asked: Asked) -> bool:
    """Whether the scratch has room for the maxima of all queries."""
    return has_scratch(asked.sizes.num_queries, asked.num_supers)


def has_scratch(num_queries: int, num_supers: int) -> bool:
    """The same of so many queries and supers. What is done in pieces reads its tables back: no graph can capture it."""
    return num_queries * num_supers * SUPER_BYTES <= SCRATCH_BYTES


def _pieces(asked: Asked) -> Iterator[Piece]:
    """What is done at a time, so that its maxima fit the scratch."""
    per_query = asked.num_supers * SUPER_BYTES
    num_queries, num_blocks = asked.sizes.num_queries, asked.sizes.num_blocks
    if is_at_once(asked):
        yield Piece(0, num_blocks, 0, num_queries)
        return
    firsts = [*asked.tables.blocks[:, Block.FIRST_QUERY].tolist(), num_queries]
    first = 0
    while first < num_blocks:
        end = first + 1
        while end < num_blocks and (firsts[end + 1] - firsts[first]) * per_query <= SCRATCH_BYTES:
            end += 1
        yield Piece(first, end - first, firsts[first], firsts[end] - firsts[first])
        first = end
