"""The scan of codes: as that of rows, but by products of whole numbers, four of which are multiplied at once."""

from __future__ import annotations

import triton
import triton.language as tl

from memstore.gpu.kernels.parts import (
    BLOCK_COLUMNS,
    BLOCK_QUERIES,
    BLOCK_QUERY,
    BLOCK_RING,
    FANOUT,
    FIRST_CELL,
    SUPER_SLOTS,
    WORDS_OF_SUPER,
    await_kernel_before,
    has_seen,
    is_seen,
    seen_slots,
)

NUM_TERMS = tl.constexpr(2)


@triton.jit
def _with_four(total, codes, numbers, HAS_DOT: tl.constexpr):
    """total + the products of the four unsigned bytes of `codes` with the four signed ones of `numbers`, all int32."""
    if HAS_DOT:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, numbers, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for at in tl.static_range(4):
            total += ((codes >> (8 * at)) & 0xFF) * ((numbers << (24 - 8 * at)) >> 24)
        return total


@triton.jit
def _products(codes, numbers, WORDS: tl.constexpr, BITS: tl.constexpr, BLOCK_W: tl.constexpr, HAS_DOT: tl.constexpr):
    """Inner products of codes with the numbers of a query, (n,) int32. codes: (n, 1) pointers; numbers: a pointer."""
    total = tl.zeros([codes.shape[0], BLOCK_W], tl.int32)
    for first in tl.static_range(0, WORDS, BLOCK_W):
        places = first + tl.arange(0, BLOCK_W)
        some = tl.load(codes + places[None, :], (places < WORDS)[None, :], 0)
        for part in tl.static_range(8 // BITS):
            asked = tl.load(numbers + part * WORDS + places, places < WORDS, 0)
            kept = some
            if BITS < 8:
                kept = (some >> (part * BITS)) & (((1 << BITS) - 1) * 0x01010101)
            total = _with_four(total, kept, tl.broadcast_to(asked[None, :], [codes.shape[0], BLOCK_W]), HAS_DOT)
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=("first_block", "num_blocks", "num_supers", "capacity", "num_cells", "first_kept"))
def scan_codes_kernel(
    numbers,
    scales,
    codes,
    terms,
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
    WORDS: tl.constexpr,
    BITS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    IS_CLEARING: tl.constexpr,
    IS_CHAINED: tl.constexpr,
    HAS_DOT: tl.constexpr,
):
    """The maxima of a block of queries over one super, by the scores of its codes; see scan_kernel.

    numbers: (Q, parts * WORDS) int32, four int8 each; scales: (Q, 2) float32, a factor and what is taken off before.
    codes: (cells, WORDS) int32; terms: (cells, 2) float32.
    """
    await_kernel_before(IS_CHAINED)
    program = tl.program_id(0)
    block = blocks + (first_block + program % num_blocks) * BLOCK_COLUMNS
    number = program // num_blocks
    first_cell = tl.load(block + FIRST_CELL)
    low, last, high = seen_slots(block, capacity)
    if IS_CLEARING:
        words = (tl.load(block + BLOCK_RING) * num_supers + number) * WORDS_OF_SUPER + tl.arange(0, WORDS_OF_SUPER)
        tl.store(bitmap + words, tl.zeros([WORDS_OF_SUPER], tl.int32))
    first_slot = number * SUPER_SLOTS
    if has_seen(first_slot, first_slot + SUPER_SLOTS, low, last, high, capacity):
        first_query = tl.load(block + BLOCK_QUERY)
        columns = tl.arange(0, BLOCK_N)
        for query in range(first_query, first_query + tl.load(block + BLOCK_QUERIES)):
            asked = numbers + query * (WORDS * (8 // BITS))
            scale, shift = tl.load(scales + query * 2), tl.load(scales + query * 2 + 1)
            kept = (query - first_kept).to(tl.int64)
            best = tl.full([FANOUT], float("-inf"), tl.float32)
            for slot in tl.static_range(0, SUPER_SLOTS, BLOCK_N):
                slots = first_slot + slot + columns
                cells = tl.minimum(first_cell + slots, num_cells - 1)
                products = _products((codes + cells * WORDS)[:, None], asked, WORDS, BITS, BLOCK_W, HAS_DOT)
                factor = tl.load(terms + cells * NUM_TERMS)
                scores = factor * (scale * ((STEP * products).to(tl.float32) - shift))
                scores -= tl.load(terms + cells * NUM_TERMS + 1)
                is_slot = is_seen(slots, low, last, high, capacity) & (scores == scores)
                scores = tl.where(is_slot, scores, float("-inf"))
                leaf = tl.max(tl.reshape(scores, [BLOCK_N // (FANOUT * FANOUT), FANOUT, FANOUT]), 1)
                best = tl.maximum(best, tl.max(leaf, 0))
                places = (first_slot + slot) // FANOUT + tl.arange(0, BLOCK_N // FANOUT)
                leaf_of = leaves + kept * (num_supers * (FANOUT * FANOUT))
                tl.store(leaf_of + places, tl.reshape(leaf, [BLOCK_N // FANOUT]))
            tl.store(supers + kept * num_supers + number, tl.max(best))
