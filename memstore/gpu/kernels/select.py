"""The selection: from the maxima of supers down to the k best rows of each query, scored from their rows in float32."""

from __future__ import annotations

import triton
import triton.language as tl

from memstore.gpu.kernels.parts import (
    COSINE,
    FANOUT,
    FIRST_CELL,
    L2,
    NUM_SEEN,
    RING_COLUMNS,
    SUPER_SLOTS,
    WORDS_OF_SUPER,
    await_kernel_before,
    has_seen,
    has_seen_slots,
    is_seen,
    seen_slots,
    slots_of,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""What a row scores whose products overflowed: it is seen, but comes after all others."""

BEYOND_OFFSETS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _ordered(scores, is_there):
    """uint32 that are ordered as float32 scores are, whatever overflowed last; 0 for what is not there."""
    bits = tl.where(scores >= LOWEST, scores, LOWEST).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(is_there, ordered, 0)


@triton.jit
def _place_of_best(ordered, TOP: tl.constexpr):
    """A place in [0, TOP) for each of the TOP best, -1 for the others; the first ones, where some are equal.

    A bar that just TOP of them reach, or the TOP-th best itself, is found by quartering; 0 where not so many are there.
    """
    is_there = ordered > 0
    num_reaching = tl.sum(is_there.to(tl.int32))
    least = tl.min(tl.where(is_there, ordered, 0xFFFFFFFF))
    bar, beyond = tl.where(num_reaching >= TOP, least, 0), tl.max(ordered) + 1
    while (num_reaching > TOP) & (beyond - bar > 1):  # at least TOP reach `bar`, fewer reach `beyond`
        part = tl.maximum((beyond - bar) // 4, 1)
        first = bar + part
        second = tl.minimum(first + part, beyond)
        third = tl.minimum(second + part, beyond)
        both = tl.sum(((ordered >= first).to(tl.int32) << 16) + (ordered >= second).to(tl.int32))
        num_first, num_second, num_third = both >> 16, both & 0xFFFF, tl.sum((ordered >= third).to(tl.int32))
        if num_second >= TOP:
            is_far = num_third >= TOP
            bar, beyond = tl.where(is_far, third, second), tl.where(is_far, beyond, third)
            num_reaching = tl.where(is_far, num_third, num_second)
        else:
            is_far = num_first >= TOP
            bar, beyond = tl.where(is_far, first, bar), tl.where(is_far, second, first)
            num_reaching = tl.where(is_far, num_first, num_reaching)
    is_better, is_equal = (ordered > bar).to(tl.int32), (ordered == bar).to(tl.int32)
    counted = tl.cumsum((is_better << 16) + is_equal)  # both in one pass, as neither reaches 2^16
    place = tl.where(is_better > 0, counted >> 16, tl.sum(is_better) + (counted & 0xFFFF)) - 1
    return tl.where((is_better + is_equal > 0) & (place < TOP), place, -1)


@triton.jit
def _chosen(scores, numbers, is_there, room, TOP: tl.constexpr):
    """The numbers of the TOP best, in any order, -1 where fewer are there. room: TOP int32 of this program's own."""
    place = _place_of_best(_ordered(scores, is_there), TOP)
    tl.debug_barrier()
    tl.store(room + place, tl.where(is_there, numbers, -1), place >= 0)
    tl.debug_barrier()
    return tl.load(room + tl.arange(0, TOP), volatile=True)


@triton.jit(do_not_specialize=("num_supers", "capacity", "first_kept"))
def choose_kernel(
    rings,
    query_rings,
    leaves,
    supers,
    chosen,
    num_supers,
    capacity,
    first_kept,
    TOP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """The leaves that one query's best rows are in. chosen: (queries, TOP) int32, -1 for none."""
    kept = tl.program_id(0).to(tl.int64)
    low, last, high = seen_slots(rings + tl.load(query_rings + kept + first_kept) * RING_COLUMNS, capacity)
    await_kernel_before(IS_CHAINED)
    room = chosen + kept * TOP
    super_of, leaf_of = supers + kept * num_supers, leaves + kept * num_supers * (FANOUT * FANOUT)

    best = tl.full([TOP], -1, tl.int32)
    for first in range(0, num_supers, BLOCK_S):
        numbers = first + tl.arange(0, BLOCK_S)
        slots = numbers * SUPER_SLOTS
        is_there = (numbers < num_supers) & has_seen(slots, slots + SUPER_SLOTS, low, last, high, capacity)
        some = _chosen(tl.load(super_of + numbers, is_there, 0.0), numbers, is_there, room, TOP)
        if IS_ONE_BLOCK:
            best = some
        else:
            both = tl.reshape(tl.join(best, some), [2 * TOP])
            best = _chosen(tl.load(super_of + both, both >= 0, 0.0), both, both >= 0, room, TOP)

    children = tl.arange(0, FANOUT)
    tiles = tl.reshape(best[:, None] * FANOUT + children[None, :], [TOP * FANOUT])
    slots = tiles * (FANOUT * FANOUT)
    is_there = (tiles >= 0) & has_seen(slots, slots + FANOUT * FANOUT, low, last, high, capacity)
    numbers = tiles[:, None] * FANOUT + children[None, :]
    maxima = tl.load(leaf_of + numbers, is_there[:, None] & (children >= 0)[None, :], float("-inf"))
    best = _chosen(tl.max(maxima, 1), tiles, is_there, room, TOP)

    numbers = tl.reshape(best[:, None] * FANOUT + children[None, :], [TOP * FANOUT])
    is_there = (numbers >= 0) & has_seen_slots(numbers, low, last, high, capacity)
    _chosen(tl.load(leaf_of + numbers, is_there, 0.0), numbers, is_there, room, TOP)


@triton.jit(do_not_specialize=("num_cells", "first_kept"))
def score_kernel(
    queries,
    keys,
    norms,
    rings,
    query_rings,
    chosen,
    scores,
    num_cells,
    first_kept,
    DIM: tl.constexpr,
    METRIC: tl.constexpr,
    TOP: tl.constexpr,
    LEAVES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """The score of every row of LEAVES of the leaves chosen for one query. scores: (queries, TOP * 8) float32.

    Where no leaf was chosen, and of rows that are not seen, it is that of another row.
    """
    kept = tl.program_id(0).to(tl.int64)
    query = kept + first_kept
    first_cell = tl.load(rings + tl.load(query_rings + query) * RING_COLUMNS + FIRST_CELL)
    await_kernel_before(IS_CHAINED)
    leaves = tl.load(chosen + kept * TOP + tl.program_id(1) * LEAVES + tl.arange(0, LEAVES))
    cells = tl.minimum(first_cell + tl.maximum(slots_of(leaves), 0), num_cells - 1)
    total = tl.zeros([LEAVES * FANOUT], tl.float32)
    length = 0.0
    for d in range(0, DIM, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        asked = tl.load(queries + query * DIM + dims, dims < DIM, 0.0).to(tl.float32)
        some = tl.load(keys + cells[:, None] * DIM + dims[None, :], (dims < DIM)[None, :], 0.0).to(tl.float32)
        if METRIC == L2:
            apart = some - asked[None, :]
            total -= tl.sum(apart * apart, 1)
        else:
            total += tl.sum(some * asked[None, :], 1)
            length += tl.sum(asked * asked)
    if METRIC == COSINE:
        total = total * tl.load(norms + cells) * tl.where(length > 0, 1 / tl.sqrt_rn(length), 0.0)
    places = tl.program_id(1) * LEAVES * FANOUT + tl.arange(0, LEAVES * FANOUT)
    tl.store(scores + kept * (TOP * FANOUT) + places, total)


@triton.jit
def hits_of(low, last, high, num_seen, leaves_of, scores_of, capacity, top_k, LEAVES: tl.constexpr, TOP: tl.constexpr):
    """The offsets (TOP,) int32 of a query's hits, best first, -1 for none, and their float32 scores, -inf there.

    leaves_of: the LEAVES that were chosen; scores_of: the scores of their rows. TOP: a power of two, at least top_k.
    """
    leaves = tl.load(leaves_of + tl.arange(0, LEAVES))
    slots = slots_of(leaves)
    is_leaf = tl.reshape(tl.broadcast_to((leaves >= 0)[:, None], [LEAVES, FANOUT]), [LEAVES * FANOUT])
    is_row = is_leaf & is_seen(slots, low, last, high, capacity)
    back = last - slots
    offset = num_seen - 1 - tl.where(back < 0, back + capacity, back)
    found = tl.load(scores_of + tl.arange(0, LEAVES * FANOUT))
    order = (tl.where(is_row, offset, 0) ^ BEYOND_OFFSETS).to(tl.uint64)
    both = tl.where(is_row, (_ordered(found, is_row).to(tl.uint64) << 32) | order, 0)
    hits = tl.topk(both.to(tl.int64, bitcast=True) ^ (-(1 << 63)), TOP) ^ (-(1 << 63))
    is_hit = (hits != 0) & (tl.arange(0, TOP) < top_k)
    hit = tl.where(is_hit, (hits & BEYOND_OFFSETS).to(tl.int32) ^ BEYOND_OFFSETS, -1)
    bits = ((hits >> 32) ^ 0x80000000).to(tl.int32)
    best = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return hit, tl.where(is_hit, best, float("-inf"))


@triton.jit(do_not_specialize=("num_supers", "capacity", "first_kept", "top_k", "before", "window"))
def finish_kernel(
    rings,
    query_rings,
    chosen,
    row_scores,
    offsets,
    scores,
    bitmap,
    num_supers,
    capacity,
    first_kept,
    top_k,
    before,
    window,
    LEAVES: tl.constexpr,
    TOP: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """The hits of one query, best first, lower positions first among equal scores.

    offsets: (Q, top_k) int32 from the first position that is seen, -1 for none; scores: (Q, top_k) float32, -inf there.
    bitmap: (R, num_supers * 16) int32; the bit of each offset that is within the window of a hit is set.
    LEAVES: how many were chosen. TOP: top_k, or the next power of two.
    """
    kept = tl.program_id(0).to(tl.int64)
    query = kept + first_kept
    number = tl.load(query_rings + query)
    ring = rings + number * RING_COLUMNS
    low, last, high = seen_slots(ring, capacity)
    num_seen = tl.load(ring + NUM_SEEN).to(tl.int32)
    await_kernel_before(IS_CHAINED)
    leaves_of, scores_of = chosen + kept * LEAVES, row_scores + kept * (LEAVES * FANOUT)
    hit, best = hits_of(low, last, high, num_seen, leaves_of, scores_of, capacity, top_k, LEAVES, TOP)
    ranks, is_hit = tl.arange(0, TOP), hit >= 0
    tl.store(offsets + query * top_k + ranks, hit, ranks < top_k)
    tl.store(scores + query * top_k + ranks, best, ranks < top_k)
    words = bitmap + number * (num_supers * WORDS_OF_SUPER)
    for at in range(0, window):
        near = hit + at - before
        is_near = is_hit & (near >= 0) & (near < num_seen)
        tl.atomic_or(words + (near >> 5), tl.full([TOP], 1, tl.int32) << (near & 31), is_near, sem="relaxed")
