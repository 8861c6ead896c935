"""The parts of a ring that maxima are kept of, which slots of them are seen, and the numbers that all kernels share.

A super is 512 neighbouring slots, cut into 8 tiles of 64; a leaf is every eighth slot of a tile. The k best rows lie
within the k leaves of the largest maxima, and those within the k tiles and the k supers of the largest maxima: each of
the k best rows is at most the maximum of its part, and fewer than k parts can have a larger one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from memstore.gpu import rings
from memstore.gpu.rings import Block, Ring

FANOUT = tl.constexpr(rings.FANOUT)
SUPER_SLOTS, WORDS_OF_SUPER = tl.constexpr(rings.SUPER_SLOTS), tl.constexpr(rings.WORDS_OF_SUPER)

INNER_PRODUCT, L2, COSINE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

RING_COLUMNS, BLOCK_COLUMNS = tl.constexpr(len(Ring)), tl.constexpr(len(Block))
FIRST_CELL, LAST_SLOT, NUM_SEEN, BEGIN = (tl.constexpr(int(column)) for column in Ring)
BLOCK_QUERY = tl.constexpr(int(Block.FIRST_QUERY))
BLOCK_QUERIES = tl.constexpr(int(Block.NUM_QUERIES))
BLOCK_RING = tl.constexpr(int(Block.RING))
"""Columns of the tables; the first ones of a block are those of its ring."""


@triton.jit
def await_kernel_before(IS_CHAINED: tl.constexpr):
    """A chained kernel is begun while the one before it ends, and waits here for what that one writes.

    That one has waited for the one before it by then: so tables, which are there before the first, are read sooner.
    """
    if IS_CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def seen_slots(ring, capacity):
    """(low, last, high): slots [low, last] and [high, capacity) are seen; either may be empty. ring: a table's row."""
    last = tl.load(ring + LAST_SLOT).to(tl.int32)
    low = last - tl.load(ring + NUM_SEEN).to(tl.int32) + 1
    return low, last, low + capacity


@triton.jit
def is_seen(slots, low, last, high, capacity):
    """Whether the newest position in each slot is among those that the ring's queries see."""
    return ((slots <= last) & (slots >= low)) | ((slots >= high) & (slots < capacity))


@triton.jit
def has_seen(first, end, low, last, high, capacity):
    """Whether any of the slots [first, end) is seen."""
    return ((low <= last) & (first <= last) & (end > low)) | ((high < capacity) & (end > high) & (first < capacity))


@triton.jit
def is_all_seen(first, end, low, last, high, capacity):
    """Whether all of the slots [first, end) are seen."""
    return ((first >= low) & (end <= last + 1)) | ((first >= high) & (end <= capacity))


@triton.jit
def has_seen_slots(leaves, low, last, high, capacity):
    """Whether any slot of each leaf is seen: by the first that is not below each of the two ranges."""
    first = (leaves // FANOUT) * (FANOUT * FANOUT) + leaves % FANOUT
    beyond = first + FANOUT * FANOUT
    older = first + tl.maximum((low - first + FANOUT - 1) & -FANOUT, 0)
    newer = first + tl.maximum((high - first + FANOUT - 1) & -FANOUT, 0)
    return ((older <= last) & (older < beyond)) | ((newer < capacity) & (newer < beyond))


@triton.jit
def slots_of(leaves):
    """The slots of each leaf. leaves: (n,) int32; gives (n * 8,), of no meaning for a negative leaf."""
    first = (leaves // FANOUT) * (FANOUT * FANOUT) + leaves % FANOUT
    slots = first[:, None] + tl.arange(0, FANOUT)[None, :] * FANOUT
    return tl.reshape(slots, [leaves.shape[0] * FANOUT])


@triton.jit
def number_of_bits(words):
    """How many bits of each int32 are set."""
    bits = words.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)
