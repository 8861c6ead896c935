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
    is_all_seen,
    is_seen,
    number_of_bits,
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
def _products(
    codes, rows, numbers, WORDS: tl.constexpr, BITS: tl.constexpr, BLOCK_W: tl.constexpr, HAS_DOT: tl.constexpr
):
    """Inner products of codes with the numbers of a query, int32 in the shape of `rows`, (8, tiles, 8).

    codes: a pointer to those of row 0; numbers: a pointer.
    """
    shape: tl.constexpr = [rows.shape[0], rows.shape[1], rows.shape[2], BLOCK_W]
    total = tl.zeros(shape, tl.int32)
    for first in tl.static_range(0, WORDS, BLOCK_W):
        places = first + tl.arange(0, BLOCK_W)
        some = tl.load(
            codes + rows[:, :, :, None] * WORDS + places[None, None, None, :], (places < WORDS)[None, None, None, :], 0
        )
        for part in tl.static_range(8 // BITS):
            asked = tl.load(numbers + part * WORDS + places, places < WORDS, 0)
            kept = some
            if BITS < 8:
                kept = (some >> (part * BITS)) & (((1 << BITS) - 1) * 0x01010101)
            total = _with_four(total, kept, tl.broadcast_to(asked[None, None, None, :], shape), HAS_DOT)
    return tl.sum(total, 3)


@triton.jit
def _hadamard(rows, columns):
    """Of a matrix of 1 and -1, the elements in these rows and columns, float32."""
    return 1.0 - 2.0 * (number_of_bits(rows & columns) & 1).to(tl.float32)


@triton.jit
def number_kernel(
    queries,
    signs,
    numbers,
    scales,
    ZERO: tl.constexpr,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    FACTOR: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """The numbers of one query, -127 to 127, zeros behind the last, and its scales; see scan_codes_kernel.

    queries: (Q, LEFT * RIGHT), powers of two; signs: as many float32; numbers: (Q, WIDTH) int8.
    FACTOR: 1 / the root of their number.
    """
    await_kernel_before(IS_CHAINED)
    query = tl.program_id(0).to(tl.int64)
    left, right = tl.arange(0, LEFT), tl.arange(0, RIGHT)
    places = left[:, None] * RIGHT + right[None, :]
    some = tl.load(queries + query * (LEFT * RIGHT) + places).to(tl.float32) * tl.load(signs + places) * FACTOR
    half = tl.sum(_hadamard(left[:, None, None], left[None, :, None]) * some[None, :, :], 1)
    turned = tl.sum(half[:, :, None] * _hadamard(right[None, :, None], right[None, None, :]), 1)
    scale = tl.max(tl.max(tl.abs(turned), 1), 0) / 127
    nearest = tl.floor(turned / tl.where(scale > 0, scale, 1.0) + 0.5)
    nearest = tl.minimum(tl.maximum(nearest, -127.0), 127.0)
    tl.store(numbers + query * WIDTH + places, nearest.to(tl.int8))
    tl.store(scales + query * 2, scale)
    tl.store(scales + query * 2 + 1, tl.sum(tl.sum(nearest, 1), 0) * ZERO)


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
    TILES: tl.constexpr,
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
        inner = tl.arange(0, FANOUT)
        tiles = tl.arange(0, TILES)
        rows = inner[:, None, None] + (tiles * (FANOUT * FANOUT))[None, :, None] + inner[None, None, :] * FANOUT
        pairs = tl.arange(0, 2)
        for query in range(first_query, first_query + tl.load(block + BLOCK_QUERIES)):
            asked = numbers + query * (WORDS * (8 // BITS))
            scale, shift = tl.load(scales + query * 2), tl.load(scales + query * 2 + 1)
            kept = (query - first_kept).to(tl.int64)
            leaf_of = leaves + kept * (num_supers * (FANOUT * FANOUT)) + first_slot // FANOUT
            best = tl.full([FANOUT, TILES], float("-inf"), tl.float32)
            for slot in range(0, SUPER_SLOTS, TILES * FANOUT * FANOUT):
                cell = first_cell + first_slot + slot
                left = tl.minimum(num_cells - 1 - cell, SUPER_SLOTS).to(tl.int32)
                near = tl.minimum(rows, left)
                both = tl.load(terms + cell * NUM_TERMS + near[:, :, :, None] * NUM_TERMS + pairs[None, None, None, :])
                products = _products(codes + cell * WORDS, near, asked, WORDS, BITS, BLOCK_W, HAS_DOT)
                factor, offset = tl.split(both)
                scores = factor * (scale * ((STEP * products).to(tl.float32) - shift)) - offset
                end = first_slot + slot + TILES * FANOUT * FANOUT
                if not is_all_seen(first_slot + slot, end, low, last, high, capacity):
                    is_slot = is_seen(first_slot + slot + rows, low, last, high, capacity)
                    scores = tl.where(is_slot, scores, float("-inf"))
                leaf = tl.max(scores, 2)
                best = tl.maximum(best, leaf)
                places = inner[:, None] + (tiles * FANOUT)[None, :]
                tl.store(leaf_of + slot // FANOUT + places, leaf)
            tl.store(supers + kept * num_supers + number, tl.max(tl.max(best, 1), 0))
