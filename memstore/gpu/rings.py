"""What a batch asks, as tables of numbers that cross to the device in one copy.

rings        one sequence in one layer: RING columns, in the order of the reply
blocks       queries of one ring that are scanned for together: BLOCK columns, in the order of the queries
query_rings  the ring of each query
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from memstore import ring

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from memstore.search import SearchBatch


FANOUT, SUPER_SLOTS, WORDS_OF_SUPER = 8, 512, 16
"""How rings are cut, see kernels/parts.py: tiles of a super, leaves of a tile, slots of a leaf; slots of a super; and
words of a bitmap with a bit for each of them.
"""


class Cells(Protocol):
    """Places with rings of `capacity` cells, in several layers: a slab's, or those of something kept beside it."""

    @property
    def capacity(self) -> int: ...

    def first_cells(self, layers: Sequence[int], places: Sequence[int]) -> NDArray[np.int64]:
        """See Slab.first_cells."""
        ...


class Ring(IntEnum):
    """The cell of slot 0; the slot of the newest position that is seen, how many are seen, the first of them."""

    FIRST_CELL = 0
    LAST_SLOT = 1
    NUM_SEEN = 2
    BEGIN = 3


class Block(IntEnum):
    """What the scan needs to know of the ring, the first query of the block, how many are left, and the ring itself."""

    FIRST_CELL = 0
    LAST_SLOT = 1
    NUM_SEEN = 2
    FIRST_QUERY = 3
    NUM_QUERIES = 4
    RING = 5


class Tables(NamedTuple):
    """All int64: rings (R, 4), blocks (B, 6), query_rings (Q,)."""

    rings: torch.Tensor
    blocks: torch.Tensor
    query_rings: torch.Tensor


class TableSizes(NamedTuple):
    """How many of each a batch has."""

    num_rings: int
    num_blocks: int
    num_queries: int

    @property
    def size(self) -> int:
        """Numbers of all tables."""
        return self.num_rings * len(Ring) + self.num_blocks * len(Block) + self.num_queries

    def split(self, flat: torch.Tensor) -> Tables:
        """The tables of a (size,) int64 tensor, in which they lie one behind the other."""
        of_rings, of_blocks = self.num_rings * len(Ring), self.num_blocks * len(Block)
        rings, blocks, query_rings = torch.split_with_sizes(flat, [of_rings, of_blocks, self.num_queries])
        return Tables(rings.view(-1, len(Ring)), blocks.view(-1, len(Block)), query_rings)


def tables(
    cells: Cells, batch: SearchBatch, groups: NDArray[np.int64], block: int, *, are_runs: bool = False
) -> tuple[TableSizes, NDArray[np.int64]]:
    """The tables of a batch, one behind the other. groups: (L, S), each ring's place in the reply.

    are_runs: what is seen of each ring lies in neighbouring slots, which are counted from the first one.
    """
    rings, order = rings_of(cells, batch, are_runs=are_runs), groups.reshape(-1)
    if batch.counts and min(batch.counts) == max(batch.counts):
        return _alike_tables(rings, batch.counts[0], order, block)
    counts = np.tile(np.array(batch.counts, np.int64), len(batch.layers))
    in_order = np.empty_like(rings)
    in_order[order] = rings

    num_blocks = -(-counts // block)
    owner = np.repeat(np.arange(len(counts)), num_blocks)
    before = (np.arange(len(owner)) - np.repeat(num_blocks.cumsum() - num_blocks, num_blocks)) * block
    first_query = counts.cumsum() - counts
    blocks = np.empty((len(owner), len(Block)), np.int64)
    blocks[:, : Block.FIRST_QUERY] = rings[owner, : Ring.BEGIN]
    blocks[:, Block.FIRST_QUERY] = first_query[owner] + before
    blocks[:, Block.NUM_QUERIES] = counts[owner] - before
    blocks[:, Block.RING] = order[owner]

    sizes = TableSizes(len(rings), len(blocks), int(counts.sum()))
    return sizes, np.concatenate((in_order.reshape(-1), blocks.reshape(-1), np.repeat(order, counts)))


def in_one_copy(made: Sequence[tuple[TableSizes, NDArray[np.int64]]], device: torch.device) -> list[Tables]:
    """Tables of several searches, on the device."""
    padded = [np.pad(flat, (0, len(flat) % 2)) for _, flat in made]  # to 16 bytes, as kernels expect them
    flat = torch.from_numpy(np.concatenate(padded)).to(device, non_blocking=True)
    parts = torch.split_with_sizes(flat, [len(each) for each in padded])
    return [sizes.split(part[: sizes.size]) for (sizes, _), part in zip(made, parts, strict=True)]


def _alike_tables(
    rings: NDArray[np.int64], count: int, order: NDArray[np.int64], block: int
) -> tuple[TableSizes, NDArray[np.int64]]:
    """The same where rings have equally many queries, in a third of the time."""
    num_rings = len(order)
    before = np.arange(0, count, block)
    sizes = TableSizes(num_rings, num_rings * len(before), num_rings * count)
    flat = np.empty(sizes.size, np.int64)
    end_of_rings = num_rings * len(Ring)
    end_of_blocks = end_of_rings + sizes.num_blocks * len(Block)
    flat[:end_of_rings].reshape(num_rings, -1)[order] = rings
    blocks = flat[end_of_rings:end_of_blocks].reshape(num_rings, -1, len(Block))
    blocks[:, :, : Block.FIRST_QUERY] = rings[:, None, : Ring.BEGIN]
    blocks[:, :, Block.FIRST_QUERY] = np.arange(num_rings)[:, None] * count + before
    blocks[:, :, Block.NUM_QUERIES] = count - before
    blocks[:, :, Block.RING] = order[:, None]
    flat[end_of_blocks:].reshape(num_rings, count)[:] = order[:, None]
    return sizes, flat


def alike_rings(sizes: TableSizes) -> torch.Tensor:
    """Tables, one behind the other, of rings that see nothing and have equally many queries, one block each."""
    flat = torch.zeros(sizes.size, dtype=torch.int64)
    of, rings = sizes.split(flat), torch.arange(sizes.num_rings)
    num_queries = sizes.num_queries // sizes.num_rings
    of.blocks[:, Block.FIRST_QUERY] = rings * num_queries
    of.blocks[:, Block.NUM_QUERIES] = num_queries
    of.blocks[:, Block.RING] = rings
    of.query_rings.copy_(rings.repeat_interleave(num_queries))
    return flat


class AlikeRings:
    """Tables on the host of rings that have equally many queries, one block each; those left over see nothing."""

    def __init__(self, sizes: TableSizes) -> None:
        """flat: (size,) int64, page-locked where there is a GPU."""
        flat = alike_rings(sizes)
        self.flat = flat.pin_memory() if torch.cuda.is_available() else flat
        of = sizes.split(self.flat)
        self._rings, self._blocks = of.rings.numpy(), of.blocks.numpy()
        self._query_rings = of.query_rings.numpy().reshape(sizes.num_rings, -1)
        self._order = np.arange(sizes.num_rings)
        self._num_laid = 0

    def lay(self, cells: Cells, batch: SearchBatch, order: NDArray[np.int64], *, are_runs: bool = False) -> None:
        """Lays the rings of a batch. order: the place of each in the reply. are_runs: see `tables`."""
        rings, num_rings = rings_of(cells, batch, are_runs=are_runs), len(order)
        self._rings[order] = rings
        self._blocks[:num_rings, : Block.FIRST_QUERY] = rings[:, : Ring.BEGIN]
        if num_rings < self._num_laid:
            self._rings[num_rings : self._num_laid] = 0
            self._blocks[num_rings : self._num_laid, : Block.FIRST_QUERY] = 0
        if not np.array_equal(order, self._order[:num_rings]) or num_rings < self._num_laid:
            self._order[:num_rings], self._order[num_rings:] = order, np.arange(num_rings, len(self._order))
            self._blocks[:, Block.RING] = self._order
            self._query_rings[:] = self._order[:, None]
        self._num_laid = num_rings


def rings_of(cells: Cells, batch: SearchBatch, *, are_runs: bool = False) -> NDArray[np.int64]:
    """(L * S, 4), layer by layer: not yet in the order of the reply. are_runs: see `tables`."""
    seen = np.array((batch.places, batch.begins, batch.ends), np.int64)
    places, begins, ends = seen
    rings = np.empty((len(batch.layers), len(places), len(Ring)), np.int64)
    rings[..., Ring.FIRST_CELL] = cells.first_cells(batch.layers, places)
    rings[..., Ring.LAST_SLOT] = ring.slot_of(np.maximum(ends - 1, 0), cells.capacity)
    rings[..., Ring.NUM_SEEN] = np.maximum(ends - begins, 0)
    rings[..., Ring.BEGIN] = begins
    if are_runs:
        rings[..., Ring.FIRST_CELL] += ring.slot_of(begins, cells.capacity)
        rings[..., Ring.LAST_SLOT] = ends - begins - 1
    return rings.reshape(-1, len(Ring))
