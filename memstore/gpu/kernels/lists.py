"""Inverted lists: the rows of lists that were chosen for a query are scored where they lie, and the best are its hits.

A list is a row of centres' slab, see gpu/lists.py, and has room for WIDTH numbers of rows: positions counted from the
first one that its generation can have, -1 where there is none. Neighbouring numbers, eight of them, are a leaf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memstore.gpu.kernels.parts import (
    BEGIN,
    COSINE,
    FANOUT,
    FIRST_CELL,
    L2,
    NUM_SEEN,
    RING_COLUMNS,
    await_kernel_before,
)
from memstore.gpu.kernels.select import BEYOND_OFFSETS, LOWEST, _chosen, _ordered


@triton.jit
def _list_of(lists, ring, number, lists_capacity, num_together, span):
    """(cell, first): where a list lies among all lists, and the position that its numbers are counted from.

    lists: the table of the rings of lists; number: of a list, from the first one that is seen. A generation has
    num_together lists, and a place among every `span` positions.
    """
    row = lists + ring * RING_COLUMNS
    position = tl.load(row + BEGIN) + number
    return tl.load(row + FIRST_CELL) + position % lists_capacity, position // num_together * span


@triton.jit(do_not_specialize=("lists_capacity", "num_together", "span", "capacity", "num_lists", "first_kept"))
def score_lists_kernel(
    queries,
    keys,
    norms,
    rings,
    query_rings,
    lists,
    chosen,
    rows_of,
    scores,
    maxima,
    lists_capacity,
    num_together,
    span,
    capacity,
    num_lists,
    first_kept,
    DIM: tl.constexpr,
    METRIC: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """The scores of the rows of one list for one query, -inf for those that are not seen, and the maximum of each leaf.

    chosen: (Q, num_lists) int32 lists, -1 for none; rows_of: (cells of lists, WIDTH) int32. scores, maxima:
    (queries, num_lists * WIDTH) and (queries, num_lists * WIDTH / 8) float32, the query `first_kept` first.
    """
    await_kernel_before(IS_CHAINED)
    kept, at = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query = kept + first_kept
    number = tl.load(chosen + query * num_lists + at)
    ring = tl.load(query_rings + query)
    row = rings + ring * RING_COLUMNS
    cell, base = _list_of(lists, ring, tl.maximum(number, 0), lists_capacity, num_together, span)
    first_cell = tl.load(row + FIRST_CELL)
    num_seen = tl.load(row + NUM_SEEN).to(tl.int32)
    first_offset = (base - tl.load(row + BEGIN)).to(tl.int32)
    first_slot = (base % capacity).to(tl.int32)
    place = (kept * num_lists + at) * WIDTH
    columns, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for column in range(0, WIDTH, BLOCK_N):
        numbers = tl.load(rows_of + cell * WIDTH + column + columns)
        offsets = numbers + first_offset
        is_row = (number >= 0) & (numbers >= 0) & (offsets >= 0) & (offsets < num_seen)
        slots = numbers + first_slot
        cells = first_cell + tl.where(slots >= capacity, slots - capacity, slots)
        total = tl.zeros([BLOCK_N], tl.float32)
        length = 0.0
        for d in range(0, DIM, BLOCK_D):
            asked = tl.load(queries + query * DIM + d + dims, d + dims < DIM, 0.0).to(tl.float32)
            is_element = is_row[:, None] & (d + dims < DIM)[None, :]
            some = tl.load(keys + cells[:, None] * DIM + (d + dims)[None, :], is_element, 0.0).to(tl.float32)
            if METRIC == L2:
                apart = some - asked[None, :]
                total -= tl.sum(apart * apart, 1)
            else:
                total += tl.sum(some * asked[None, :], 1)
                length += tl.sum(asked * asked)
        if METRIC == COSINE:
            total = total * tl.load(norms + cells, is_row, 0.0) * tl.where(length > 0, 1 / tl.sqrt_rn(length), 0.0)
        total = tl.where(is_row, tl.where(total >= LOWEST, total, LOWEST), float("-inf"))
        tl.store(scores + place + column + columns, total)
        leaves = tl.max(tl.reshape(total, [BLOCK_N // FANOUT, FANOUT]), 1)
        tl.store(maxima + (place + column) // FANOUT + tl.arange(0, BLOCK_N // FANOUT), leaves)


@triton.jit
def packed_hits(scores, offsets, is_hit):
    """int64 that are the larger the better, and of equal scores the lower the offset; the least of all for no hit."""
    order = (BEYOND_OFFSETS - tl.where(is_hit, offsets, 0)).to(tl.uint64)
    both = tl.where(is_hit, (_ordered(scores, is_hit).to(tl.uint64) << 32) | order, 0)
    return both.to(tl.int64, bitcast=True) ^ (-(1 << 63))


@triton.jit
def keep_hits(hits, query, num_seen, offsets, scores, words, num_short, top_k, before, window, TOP: tl.constexpr):
    """Writes what packed_hits made of the TOP best of one query, the best first. words: of its ring's bitmap.

    num_short: (1,) int32, to which 1 is added if fewer hits are found than there are rows.
    """
    bits_of = hits ^ (-(1 << 63))
    ranks = tl.arange(0, TOP)
    is_hit = (bits_of != 0) & (ranks < top_k)
    hit = tl.where(is_hit, BEYOND_OFFSETS - (bits_of & BEYOND_OFFSETS).to(tl.int32), -1)
    bits = ((bits_of >> 32) ^ 0x80000000).to(tl.int32)
    score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    tl.store(offsets + query * top_k + ranks, hit, ranks < top_k)
    tl.store(scores + query * top_k + ranks, tl.where(is_hit, score, float("-inf")), ranks < top_k)
    if tl.sum(is_hit.to(tl.int32)) < tl.minimum(num_seen, top_k):
        tl.atomic_add(num_short, 1, sem="relaxed")
    for at in range(0, window):
        near = hit + at - before
        is_near = is_hit & (near >= 0) & (near < num_seen)
        tl.atomic_or(words + (near >> 5), tl.full([TOP], 1, tl.int32) << (near & 31), is_near, sem="relaxed")


@triton.jit(
    do_not_specialize=(
        "lists_capacity",
        "num_together",
        "span",
        "num_lists",
        "num_others",
        "num_words",
        "first_kept",
        "top_k",
        "before",
        "window",
    )
)
def finish_lists_kernel(
    rings,
    query_rings,
    lists,
    chosen,
    rows_of,
    row_scores,
    maxima,
    room,
    others,
    other_scores,
    offsets,
    scores,
    bitmap,
    num_short,
    lists_capacity,
    num_together,
    span,
    num_lists,
    num_others,
    num_words,
    first_kept,
    top_k,
    before,
    window,
    WIDTH: tl.constexpr,
    LEAVES: tl.constexpr,
    OTHERS: tl.constexpr,
    TOP: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """The hits of one query, out of its lists and of others that were found elsewhere; see finish_kernel.

    LEAVES: of a query, or the next power of two. others, other_scores: (Q, num_others) int32 offsets from the first
    position that is seen, -1 for none, and float32; OTHERS: 0, or num_others or the next power of two. room:
    (queries, TOP) int32. num_short: (1,) int32, to which 1 is added if fewer hits are found than there are rows.
    """
    await_kernel_before(IS_CHAINED)
    kept = tl.program_id(0).to(tl.int64)
    query = kept + first_kept
    number = tl.load(query_rings + query)
    row = rings + number * RING_COLUMNS
    num_seen, begin = tl.load(row + NUM_SEEN).to(tl.int32), tl.load(row + BEGIN)
    leaves = tl.arange(0, LEAVES)
    num_leaves = num_lists * (WIDTH // FANOUT)
    best = tl.load(maxima + kept * num_leaves + leaves, leaves < num_leaves, float("-inf"))
    some = _chosen(best, leaves, best >= LOWEST, room + kept * TOP, TOP)

    places = tl.reshape(some[:, None] * FANOUT + tl.arange(0, FANOUT)[None, :], [TOP * FANOUT])
    found = tl.load(row_scores + kept * (num_lists * WIDTH) + places, places >= 0, float("-inf"))
    is_row = found >= LOWEST
    which = tl.load(chosen + query * num_lists + places // WIDTH, is_row, 0)
    cell, base = _list_of(lists, number, which, lists_capacity, num_together, span)
    rows = tl.load(rows_of + cell * WIDTH + places % WIDTH, is_row, 0)
    hits = tl.topk(packed_hits(found, rows + (base - begin).to(tl.int32), is_row), TOP)
    if OTHERS > 0:
        numbers = tl.arange(0, OTHERS)
        other = tl.load(others + query * num_others + numbers, numbers < num_others, -1)
        other_score = tl.load(other_scores + query * num_others + numbers, other >= 0, 0.0)
        more = tl.topk(packed_hits(other_score, other, other >= 0), TOP)
        hits = tl.topk(tl.reshape(tl.join(hits, more), [2 * TOP]), TOP)
    words = bitmap + number * num_words
    keep_hits(hits, query, num_seen, offsets, scores, words, num_short, top_k, before, window, TOP)
