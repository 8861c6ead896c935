"""The distinct rows of a reply, from the bitmaps of what its windows ask for: how many, where and whose; their copy."""

from __future__ import annotations

import triton
import triton.language as tl

from memstore.gpu.kernels.parts import (
    BEGIN,
    FIRST_CELL,
    LAST_SLOT,
    NUM_SEEN,
    RING_COLUMNS,
    await_kernel_before,
    number_of_bits,
)


@triton.jit(do_not_specialize=("num_rings", "num_words"))
def count_kernel(
    rings,
    bitmap,
    before_word,
    counts,
    row_splits,
    ticket,
    num_rings,
    num_words,
    BLOCK: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One ring. Fills before_word (R, num_words) int32: the bits of the ring that are set before each word.

    counts: (R,) int64; row_splits: (R + 1,) int64, filled by the ring that is done last. ticket: 0, and 0 again.
    """
    await_kernel_before(IS_CHAINED)
    number = tl.program_id(0)
    first = number.to(tl.int64) * num_words
    count = 0
    for word in range(0, num_words, BLOCK):
        at = word + tl.arange(0, BLOCK)
        bits = number_of_bits(tl.load(bitmap + first + at, at < num_words, 0))
        tl.store(before_word + first + at, count + tl.cumsum(bits) - bits, at < num_words)
        count += tl.sum(bits)
    tl.store(counts + number, count.to(tl.int64))
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1) == num_rings - 1:
        total = tl.full([], 0, tl.int64)
        for first_ring in range(0, num_rings, BLOCK):
            at = first_ring + tl.arange(0, BLOCK)
            some = tl.load(counts + at, at < num_rings, 0, volatile=True)
            tl.store(row_splits + at + 1, total + tl.cumsum(some), at < num_rings)
            total += tl.sum(some)
        tl.store(row_splits, tl.full([], 0, tl.int64))
        tl.store(ticket, 0)


@triton.jit(do_not_specialize=("num_words", "num_asked", "capacity", "top_k", "before", "window"))
def locate_kernel(
    rings,
    query_rings,
    offsets,
    bitmap,
    before_word,
    row_splits,
    index,
    positions,
    cells,
    num_words,
    num_asked,
    capacity,
    top_k,
    before,
    window,
    BLOCK: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """Fills index (Q, top_k, window) int32, and of each row that occurs in it its position and its cell, int64.

    A row that occurs more than once is written as often, and each time the same.
    """
    await_kernel_before(IS_CHAINED)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_asked = at < num_asked
    hit = at // window
    offset = tl.load(offsets + hit, is_asked, -1)
    number = tl.load(query_rings + hit // top_k, is_asked, 0)
    ring = rings + number * RING_COLUMNS
    near = offset + (at - hit * window).to(tl.int32) - before
    num_seen = tl.load(ring + NUM_SEEN, is_asked, 0).to(tl.int32)
    is_near = is_asked & (offset >= 0) & (near >= 0) & (near < num_seen)
    word = number * num_words + (near >> 5)
    below = tl.load(bitmap + word, is_near, 0) & ((tl.full([BLOCK], 1, tl.int32) << (near & 31)) - 1)
    row = tl.load(row_splits + number, is_near, 0) + tl.load(before_word + word, is_near, 0) + number_of_bits(below)
    tl.store(index + at, tl.where(is_near, row, -1).to(tl.int32), is_asked)
    tl.store(positions + row, tl.load(ring + BEGIN, is_near, 0) + near, is_near)
    slot = tl.load(ring + LAST_SLOT, is_near, 0) - (num_seen - 1 - near)
    slot = tl.where(slot < 0, slot + capacity, slot)
    tl.store(cells + row, tl.load(ring + FIRST_CELL, is_near, 0) + slot, is_near)


@triton.jit(do_not_specialize=("num_rings",))
def gather_kernel(
    source,
    cells,
    row_splits,
    target,
    num_rings,
    WORDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """Copies the rows that a reply has. source: (cells, WORDS) of integers of any size; target: (rows, WORDS)."""
    await_kernel_before(IS_CHAINED)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = rows < tl.load(row_splits + num_rings)
    chosen = tl.load(cells + rows, is_row, 0)
    for first in range(0, WORDS, BLOCK_W):
        words = first + tl.arange(0, BLOCK_W)
        is_word = is_row[:, None] & (words < WORDS)[None, :]
        some = tl.load(source + chosen[:, None] * WORDS + words[None, :], is_word, 0)
        tl.store(target + rows[:, None] * WORDS + words[None, :], some, is_word)
