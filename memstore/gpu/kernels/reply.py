"""A whole reply by one kernel, where each ring has one query: its hits, windows, distinct rows and their copy."""

from __future__ import annotations

import triton
import triton.language as tl

from memstore.gpu.kernels.parts import (
    BEGIN,
    FANOUT,
    FIRST_CELL,
    NUM_SEEN,
    RING_COLUMNS,
    await_kernel_before,
    seen_slots,
)
from memstore.gpu.kernels.select import hits_of

BEYOND = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _rows_before(published, ticket, number, count, num_rings, RINGS: tl.constexpr):
    """The rows of all rings before this one, each of which is asked until it has said how many it has.

    published: (R,) int32 of 0, ticket: (1,) int32 of 0; both are that again when the last ring has been answered. All
    programs run at the same time, as they are few.
    """
    tl.atomic_xchg(published + number, count + 1, sem="relaxed")
    others = tl.arange(0, RINGS)
    said = tl.load(published + others, others < number, 1, volatile=True)
    while tl.min(said) == 0:
        said = tl.load(published + others, others < number, 1, volatile=True)
    before = tl.sum(said - 1)
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="relaxed") == num_rings - 1:
        tl.store(published + others, tl.zeros([RINGS], tl.int32), others < num_rings)
        tl.store(ticket, 0)
    return before


@triton.jit
def _distinct(near):
    """Of (n,) offsets, -1 for none: which are the first of their kind; how many distinct ones are less than each."""
    at = tl.arange(0, near.shape[0])
    is_again = (near[:, None] == near[None, :]) & (at[None, :] < at[:, None])
    is_first = (near >= 0) & (tl.sum(is_again.to(tl.int32), 1) == 0)
    once = tl.where(is_first, near, BEYOND)
    return is_first, tl.sum((once[None, :] < near[:, None]).to(tl.int32), 1)


@triton.jit(do_not_specialize=("num_rings", "capacity", "top_k", "before", "window"))
def reply_kernel(
    rings,
    query_rings,
    chosen,
    row_scores,
    published,
    ticket,
    row_splits,
    positions,
    cells,
    index,
    scores,
    source,
    target,
    num_rings,
    capacity,
    top_k,
    before,
    window,
    LEAVES: tl.constexpr,
    TOP: tl.constexpr,
    WINDOW: tl.constexpr,
    RINGS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One query, the only one of its ring. See finish_kernel, count_kernel, locate_kernel and gather_kernel.

    WINDOW, RINGS: powers of two that are not below `window` and `num_rings`. source, target: WORDS integers a row; with
    WORDS = 0 no rows are copied.
    """
    query = tl.program_id(0).to(tl.int64)
    number = tl.load(query_rings + query)
    ring = rings + number * RING_COLUMNS
    low, last, high = seen_slots(ring, capacity)
    num_seen, begin, first_cell = (
        tl.load(ring + NUM_SEEN).to(tl.int32),
        tl.load(ring + BEGIN),
        tl.load(ring + FIRST_CELL),
    )
    await_kernel_before(IS_CHAINED)
    leaves_of, scores_of = chosen + query * LEAVES, row_scores + query * (LEAVES * FANOUT)
    hit, best = hits_of(low, last, high, num_seen, leaves_of, scores_of, capacity, top_k, LEAVES, TOP)
    ranks, places = tl.arange(0, TOP), tl.arange(0, WINDOW)
    tl.store(scores + query * top_k + ranks, best, ranks < top_k)

    around = hit[:, None] + places[None, :] - before
    is_near = (hit >= 0)[:, None] & (places < window)[None, :] & (around >= 0) & (around < num_seen)
    near = tl.reshape(tl.where(is_near, around, -1), [TOP * WINDOW])
    is_first, rank = _distinct(near)
    count = tl.sum(is_first.to(tl.int32))
    first_row = _rows_before(published, ticket, number, count, num_rings, RINGS)
    row = (first_row + rank).to(tl.int64)

    if number == 0:
        tl.store(row_splits, tl.full([], 0, tl.int64))
    tl.store(row_splits + number + 1, (first_row + count).to(tl.int64))
    at = tl.arange(0, TOP * WINDOW)
    asked = query * top_k * window + (at // WINDOW) * window + at % WINDOW
    tl.store(index + asked, tl.where(near >= 0, row, -1).to(tl.int32), (at // WINDOW < top_k) & (at % WINDOW < window))
    tl.store(positions + row, begin + near, is_first)
    slot = last - (num_seen - 1 - near)
    cell = first_cell + tl.where(slot < 0, slot + capacity, slot)
    tl.store(cells + row, cell, is_first)
    if WORDS > 0:
        for first in range(0, WORDS, BLOCK_W):
            words = first + tl.arange(0, BLOCK_W)
            is_word = is_first[:, None] & (words < WORDS)[None, :]
            some = tl.load(source + cell[:, None] * WORDS + words[None, :], is_word, 0)
            tl.store(target + row[:, None] * WORDS + words[None, :], some, is_word)
