"""Graphs over the rows of a generation: built from each row's nearest ones, and walked for the rows nearest to a query.

As in CAGRA (arXiv 2308.15136): of a row's nearest rows those are left out that a detour leads to as well, and the graph
has the links the other way round, too. A walk keeps the best rows that it has met and goes on from the best of those
that it has not gone on from. It begins at the nearest of some rows, the entries, which are found by exact search.
A node is a row, by its position counted from the first one of the generation's span.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memstore.gpu.kernels.lists import keep_hits, packed_hits
from memstore.gpu.kernels.parts import BEGIN, COSINE, FIRST_CELL, L2, NUM_SEEN, RING_COLUMNS, await_kernel_before
from memstore.gpu.kernels.select import BEYOND_OFFSETS, LOWEST, _ordered


@triton.jit(do_not_specialize=("first",))
def link_kernel(nearest, links, first, NEAREST: tl.constexpr, WIDTH: tl.constexpr, LINKS: tl.constexpr):
    """The links of one row: its nearest rows, those with the fewest detours first, of equally many the nearest first.

    nearest: (n, NEAREST) int32, the nearest first, -1 for none. links: (n, LINKS) int32. A detour to a row is another
    of the nearest rows that is nearer than it, and has it among its own nearest, at a better place than it has here.
    first: the first row of these programs. WIDTH: NEAREST or the next power of two.
    """
    node = tl.program_id(0).to(tl.int64) + first
    places = tl.arange(0, WIDTH)
    near = tl.load(nearest + node * NEAREST + places, places < NEAREST, -1)
    detours = tl.zeros([WIDTH], tl.int32)
    for at in range(0, NEAREST - 1):
        via = tl.load(nearest + node * NEAREST + at).to(tl.int64)
        theirs = tl.load(nearest + via * NEAREST + places, (places < NEAREST) & (via >= 0), -1)
        is_detour = (near[:, None] == theirs[None, :]) & (places[None, :] < places[:, None]) & (places > at)[:, None]
        detours += tl.sum(is_detour.to(tl.int32), 1)
    order = tl.where(near >= 0, detours * WIDTH + places, WIDTH * WIDTH).to(tl.int64)
    least = tl.sort((order << 32) | (near.to(tl.int64) & 0xFFFFFFFF))
    tl.store(links + node * LINKS + places, (least & 0xFFFFFFFF).to(tl.int32), places < LINKS)


@triton.jit(do_not_specialize=("first",))
def join_kernel(links, back, joined, first, LINKS: tl.constexpr, WIDTH: tl.constexpr):
    """Half of a row's links, then half of those that lead to it, then the others, each once. All (n, LINKS) int32.

    A row without any is linked with itself, so that it is known to be one. WIDTH: LINKS or the next power of two.
    """
    node = tl.program_id(0).to(tl.int64) + first
    numbers = tl.arange(0, 2 * WIDTH)
    place, is_back = numbers % WIDTH, numbers >= WIDTH
    half: tl.constexpr = LINKS // 2
    is_late = place >= half
    forth = tl.load(links + node * LINKS + place, (place < LINKS) & ~is_back, -1)
    back_links = tl.load(back + node * LINKS + place, (place < LINKS) & is_back, -1)
    ends = tl.where(is_back, back_links, forth)
    order = (is_late.to(tl.int32) * 2 + is_back.to(tl.int32)) * WIDTH + place
    is_same = (ends[:, None] == ends[None, :]) & (order[None, :] < order[:, None])
    is_kept = (ends >= 0) & (ends != node) & (tl.sum(is_same.to(tl.int32), 1) == 0)
    before = (is_kept[None, :] & (order[None, :] < order[:, None])).to(tl.int32)
    at = tl.sum(before, 1)
    tl.store(joined + node * LINKS + at, ends, is_kept & (at < LINKS))
    num_kept = tl.minimum(tl.sum(is_kept.to(tl.int32)), LINKS)
    rest = tl.arange(0, WIDTH)
    alone = tl.where(num_kept == 0, node, -1).to(tl.int32)
    tl.store(joined + node * LINKS + rest, tl.where(rest == 0, alone, -1), (rest >= num_kept) & (rest < LINKS))


@triton.jit
def _scores_of(queries, keys, norms, cells, is_row, DIM: tl.constexpr, METRIC: tl.constexpr, BLOCK_D: tl.constexpr):
    """Scores (n,) float32 of the rows in some cells for one query, of no meaning where there is none."""
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([cells.shape[0]], tl.float32)
    length = 0.0
    for d in range(0, DIM, BLOCK_D):
        asked = tl.load(queries + d + dims, d + dims < DIM, 0.0).to(tl.float32)
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
    return tl.where(total >= LOWEST, total, LOWEST)


@triton.jit
def _met(scores, nodes, is_there):
    """int64 that are the larger the better; the lowest bit is set: a walk has not gone on from there."""
    low = ((BEYOND_OFFSETS - tl.where(is_there, nodes, 0)).to(tl.uint64) << 1) | 1
    both = tl.where(is_there, (_ordered(scores, is_there).to(tl.uint64) << 32) | low, 0)
    return both.to(tl.int64, bitcast=True) ^ (-(1 << 63))


@triton.jit
def _node_of(met):
    """The node, -1 where none was met."""
    bits = met ^ (-(1 << 63))
    return tl.where(bits != 0, BEYOND_OFFSETS - ((bits >> 1) & BEYOND_OFFSETS).to(tl.int32), -1)


@triton.jit
def _link_cells(offsets, first_cell, begin, span, num_kept):
    """(cells, first): where the links of rows lie, and the offset of the first row that their span can have.

    offsets: from position `begin`. A place has `num_kept` spans, from cell first_cell * span on.
    """
    into = (begin % span).to(tl.int32)
    spans = (offsets + into) // span
    first = spans * span - into
    kept = (first_cell + (begin // span + spans) % num_kept) * span
    return kept + (offsets - first), first


@triton.jit(
    do_not_specialize=("span", "num_entries", "stride", "num_kept", "capacity", "num_chosen", "most_steps", "top_k")
)
def walk_kernel(
    queries,
    keys,
    norms,
    rings,
    query_rings,
    entries,
    chosen,
    links,
    offsets,
    scores,
    span,
    num_entries,
    stride,
    num_kept,
    capacity,
    num_chosen,
    most_steps,
    top_k,
    DIM: tl.constexpr,
    METRIC: tl.constexpr,
    LINKS: tl.constexpr,
    WIDTH: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """The best rows that a walk meets for one query.

    It begins at `chosen`, (Q, num_chosen) int32: numbers of entries from the first one that is seen, -1 for none.
    entries: the table of the rings of entries, of which a generation has `num_entries`, each `stride` rows after the
    one before. links: (cells, LINKS) int32, -1 for none; a row that is in no generation has none. offsets, scores:
    (Q, top_k) int32 and float32, -1 and -inf for none. LIST: rows that are kept. WIDTH: LINKS or the next power of two.
    """
    await_kernel_before(IS_CHAINED)
    query = tl.program_id(0).to(tl.int64)
    number = tl.load(query_rings + query)
    row, line = rings + number * RING_COLUMNS, entries + number * RING_COLUMNS
    begin, first_cell = tl.load(row + BEGIN), tl.load(row + FIRST_CELL)
    num_seen = tl.load(row + NUM_SEEN).to(tl.int32)
    first_slot = (begin % capacity).to(tl.int32)
    first_line = tl.load(line + FIRST_CELL) // num_entries // num_kept * num_kept
    asked = queries + query * DIM

    ranks = tl.arange(0, LIST)
    entry = tl.load(chosen + query * num_chosen + ranks, ranks < num_chosen, -1)
    at = tl.load(line + BEGIN) + entry
    nodes = (at // num_entries * span + at % num_entries * stride - begin).to(tl.int32)
    is_new = (entry >= 0) & (nodes >= 0) & (nodes < num_seen)
    nodes = tl.where(is_new, nodes, 0)
    entry_cells, _ = _link_cells(nodes, first_line, begin, span, num_kept)
    is_new = is_new & (tl.load(links + entry_cells * LINKS, is_new, -1) >= 0)
    slots = nodes + first_slot
    cells = first_cell + tl.where(slots >= capacity, slots - capacity, slots)
    met = _met(_scores_of(asked, keys, norms, cells, is_new, DIM, METRIC, BLOCK_D), nodes, is_new)
    met = tl.sort(met, descending=True)

    together: tl.constexpr = LIST // WIDTH
    numbers, places = tl.arange(0, together), tl.arange(0, WIDTH)
    is_open = met & 1
    steps = most_steps
    while (tl.max(is_open) > 0) & (steps > 0):
        nodes = _node_of(met)
        counted = tl.cumsum(is_open.to(tl.int32))
        is_next = (counted[None, :] == numbers[:, None] + 1) & (is_open > 0)[None, :]
        ends = tl.sum(tl.where(is_next, nodes[None, :] + 1, 0), 1) - 1
        met -= tl.where(counted <= together, is_open, 0)
        link_cells, first = _link_cells(tl.maximum(ends, 0), first_line, begin, span, num_kept)
        is_link = (ends >= 0)[:, None] & (places < LINKS)[None, :]
        new = tl.load(links + link_cells[:, None] * LINKS + places[None, :], is_link, -1)
        new = tl.reshape(tl.where(new >= 0, new + first[:, None], -1), [LIST])
        is_known = tl.sum((new[:, None] == nodes[None, :]).to(tl.int32), 1) > 0
        is_twice = (new[:, None] == new[None, :]) & (ranks[None, :] < ranks[:, None])
        is_new = (new >= 0) & (new < num_seen) & ~is_known & (tl.sum(is_twice.to(tl.int32), 1) == 0)
        new = tl.where(is_new, new, 0)
        slots = new + first_slot
        cells = first_cell + tl.where(slots >= capacity, slots - capacity, slots)
        more = _met(_scores_of(asked, keys, norms, cells, is_new, DIM, METRIC, BLOCK_D), new, is_new)
        met = tl.topk(tl.reshape(tl.join(met, more), [2 * LIST]), LIST)
        is_open = met & 1
        steps -= 1

    nodes = _node_of(met)
    bits = (((met ^ (-(1 << 63))) >> 32) ^ 0x80000000).to(tl.int32)
    score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    target = query * top_k + ranks
    tl.store(offsets + target, nodes, ranks < top_k)
    tl.store(scores + target, tl.where(nodes >= 0, score, float("-inf")), ranks < top_k)


@triton.jit(do_not_specialize=("num_others", "num_words", "top_k", "before", "window"))
def finish_walks_kernel(
    rings,
    query_rings,
    others,
    other_scores,
    offsets,
    scores,
    bitmap,
    num_short,
    num_others,
    num_words,
    top_k,
    before,
    window,
    OTHERS: tl.constexpr,
    TOP: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """The hits of one query out of those that were found in several places, each row once; see finish_lists_kernel."""
    await_kernel_before(IS_CHAINED)
    query = tl.program_id(0).to(tl.int64)
    number = tl.load(query_rings + query)
    row = rings + number * RING_COLUMNS
    numbers = tl.arange(0, OTHERS)
    other = tl.load(others + query * num_others + numbers, numbers < num_others, -1)
    score = tl.load(other_scores + query * num_others + numbers, other >= 0, 0.0)
    hits = tl.topk(packed_hits(score, other, other >= 0), TOP)
    words = bitmap + number * num_words
    num_seen = tl.load(row + NUM_SEEN).to(tl.int32)
    keep_hits(hits, query, num_seen, offsets, scores, words, num_short, top_k, before, window, TOP)
