"""The scan: reads every row that is seen once for a block of queries, and keeps the maximum of each leaf, no score."""

from __future__ import annotations

import triton
import triton.language as tl

from memstore.gpu.kernels.parts import (
    BLOCK_COLUMNS,
    BLOCK_QUERIES,
    BLOCK_QUERY,
    BLOCK_RING,
    COSINE,
    FANOUT,
    FIRST_CELL,
    L2,
    SUPER_SLOTS,
    WORDS_OF_SUPER,
    await_kernel_before,
    has_seen,
    is_all_seen,
    is_seen,
    seen_slots,
)

COUNTS = ("first_block", "num_blocks", "num_supers", "capacity", "num_cells", "first_kept")


@triton.jit
def _scales_of(largest):
    """A power of two for each query that makes its largest element 2^14 to 2^15, and its inverse."""
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, 15)
    scale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def _with_products(products, asked, scale, some, PARTS: tl.constexpr):
    """products + asked @ some; queries of another precision than the rows as the sum of PARTS parts in theirs."""
    if PARTS == 0:
        products = tl.dot(asked.to(some.dtype), some, products, input_precision="ieee")
    else:
        rest = asked.to(tl.float32) * scale[:, None]
        for _ in tl.static_range(PARTS):
            part = rest.to(some.dtype)
            products = tl.dot(part, some, products)
            rest -= part.to(tl.float32)
    return products


@triton.jit
def _products(whole, asked, is_query, scale, rows, DIM: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inner products of queries (n, dim) with rows (m, dim): pointers, but for `whole`, which is read if it has all."""
    dims = tl.arange(0, BLOCK_D)
    products = tl.zeros([asked.shape[0], rows.shape[0]], tl.float32)
    if DIM == BLOCK_D:
        return _with_products(products, whole, scale, tl.trans(tl.load(rows + dims[None, :])), PARTS)
    elif DIM < BLOCK_D:
        some = tl.load(rows + dims[None, :], (dims < DIM)[None, :], 0.0)
        return _with_products(products, whole, scale, tl.trans(some), PARTS)
    else:
        for d in range(0, DIM, BLOCK_D):
            is_dim = (d + dims < DIM)[None, :]
            few = tl.load(asked + (d + dims)[None, :], is_query[:, None] & is_dim, 0.0)
            some = tl.load(rows + (d + dims)[None, :], is_dim, 0.0)
            products = _with_products(products, few, scale, tl.trans(some), PARTS)
        return products


@triton.jit
def _ranked(products, norms, slots, left, is_whole, is_slot, METRIC: tl.constexpr):
    """What rows are ranked by, without what is the same for all rows of a query; -inf for those that are not seen.

    norms: a pointer to that of the first slot; left: the last of its neighbours that may be read.
    """
    if METRIC == L2:
        if is_whole:
            weights = tl.load(norms + slots)
        else:
            weights = tl.load(norms + slots, is_slot, float("inf"))
        return 2 * products - weights[None, :]
    else:
        if METRIC == COSINE:
            products *= tl.load(norms + tl.minimum(slots, left))[None, :]
        if is_whole:
            weights = tl.zeros([slots.shape[0]], tl.float32)
        else:
            weights = tl.where(is_slot, 0.0, float("inf"))
        return products - weights[None, :]


@triton.jit(do_not_specialize=COUNTS)
def scan_kernel(
    queries,
    keys,
    norms,
    blocks,
    leaves,
    supers,
    bitmap,
    first_block,
    num_blocks,
    num_supers,
    capacity,
    num_cells,
    first_kept,
    DIM: tl.constexpr,
    METRIC: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    SUPERS: tl.constexpr,
    IS_CLEARING: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """The maxima of a block of queries over SUPERS supers.

    leaves, supers: (queries, num_supers * 64) and (queries, num_supers) float32, the query `first_kept` first; of parts
    that are not seen they are not written. bitmap: (R, num_supers * 16) int32, cleared where IS_CLEARING.
    """
    await_kernel_before(IS_CHAINED)
    program = tl.program_id(0)
    block = blocks + (first_block + program % num_blocks) * BLOCK_COLUMNS
    first_cell = tl.load(block + FIRST_CELL)
    low, last, high = seen_slots(block, capacity)
    ring = tl.load(block + BLOCK_RING)
    numbers = tl.arange(0, BLOCK_Q)
    is_query = numbers < tl.load(block + BLOCK_QUERIES)
    query = tl.load(block + BLOCK_QUERY) + numbers
    asked = queries + query[:, None] * DIM
    dims = tl.arange(0, BLOCK_D)
    scale = tl.full([BLOCK_Q], 1, tl.float32)
    inverse = scale
    if PARTS > 0:
        largest = tl.zeros([BLOCK_Q], tl.float32)
        for d in range(0, DIM, BLOCK_D):
            is_here = is_query[:, None] & (d + dims < DIM)[None, :]
            some = tl.load(asked + (d + dims)[None, :], is_here, 0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(some), 1))
        scale, inverse = _scales_of(largest)
    whole = tl.load(asked + dims[None, :], is_query[:, None] & (dims < DIM)[None, :], 0.0)
    kept = query - first_kept
    leaf_of = leaves + kept[:, None] * (num_supers * (FANOUT * FANOUT)) + tl.arange(0, BLOCK_N // FANOUT)[None, :]
    columns = tl.arange(0, BLOCK_N)
    first_super = (program // num_blocks) * SUPERS
    for number in range(first_super, tl.minimum(first_super + SUPERS, num_supers)):
        if IS_CLEARING:
            words = (ring * num_supers + number) * WORDS_OF_SUPER + tl.arange(0, WORDS_OF_SUPER)
            tl.store(bitmap + words, tl.zeros([WORDS_OF_SUPER], tl.int32))
        first_slot = number * SUPER_SLOTS
        if has_seen(first_slot, first_slot + SUPER_SLOTS, low, last, high, capacity):
            best = tl.full([BLOCK_Q, FANOUT], float("-inf"), tl.float32)
            for slot in tl.range(first_slot, first_slot + SUPER_SLOTS, BLOCK_N, num_stages=STAGES):
                cell = first_cell + slot
                left = tl.minimum(num_cells - 1 - cell, BLOCK_N).to(tl.int32)
                rows = keys + cell * DIM + tl.minimum(columns, left)[:, None] * DIM
                products = _products(whole, asked, is_query, scale, rows, DIM, PARTS, BLOCK_D)
                if PARTS > 0:
                    products *= inverse[:, None]
                is_whole = is_all_seen(slot, slot + BLOCK_N, low, last, high, capacity)
                is_slot = is_seen(slot + columns, low, last, high, capacity)
                scores = _ranked(products, norms + cell, columns, left, is_whole, is_slot, METRIC)
                leaf = tl.max(tl.reshape(scores, [BLOCK_Q, BLOCK_N // (FANOUT * FANOUT), FANOUT, FANOUT]), 2)
                best = tl.maximum(best, tl.max(leaf, 1))
                tl.store(leaf_of + slot // FANOUT, tl.reshape(leaf, [BLOCK_Q, BLOCK_N // FANOUT]), is_query[:, None])
            tl.store(supers + kept * num_supers + number, tl.max(best, 1), is_query)
