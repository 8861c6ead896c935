"""Table: the job of a search as Python makes it, for compiled code to find by its address."""

from __future__ import annotations

import copy
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from memstore.host import job
from memstore.host.merge import find_again
from memstore.host.scan import help_scan
from memstore.host.tiles import PANEL

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from memstore.host.scoring import Rows
    from memstore.search import SearchBatch


class Stored(NamedTuple):
    """What is searched: see Rows, and Coded; without codes those and their terms are of no length."""

    rows: Rows
    codes: NDArray[np.uint8]
    terms: NDArray[np.float32]
    num_places: int
    capacity: int


class Table:
    """One job of a batch, and the arrays that compiled code fills in for it."""

    def __init__(
        self,
        header: tuple[int, ...],
        lengths: tuple[int, ...],
        stored: Stored,
        batch: SearchBatch,
        rings: NDArray[np.int64],
    ) -> None:
        """header, lengths: see Plan. rings: see rings.py; all jobs of a batch fill in the same."""
        num_layers, num_queries, dim = batch.queries.shape
        num_queries *= num_layers
        bits, top_k, most_lists = header[job.BITS], header[job.TOP_K], header[job.MOST_LISTS]
        num_coded = num_queries if bits else 0
        width = -(-dim * bits // 8) * (8 // bits) if bits else dim
        num_floats = num_queries + num_coded + most_lists * top_k + header[job.MOST_PANELS] * dim * PANEL
        self._floats, self._numbers = np.empty(num_floats, np.float32), np.empty((num_coded, width), np.int8)
        rows, codes = stored.rows, stored.codes
        arrays = rows.keys, rows.norms, codes, stored.terms, self._floats, self._numbers, rings
        self._kept = arrays  # alive
        begin = (
            *header,
            *(stored.num_places, stored.capacity, num_layers, len(batch.places)),
            *(num_queries, dim, batch.top_k),
            *(len(rows.keys), len(rows.norms), len(codes), rows.keys.shape[1], codes.shape[1], width),
            *(array.ctypes.data for array in arrays),
            *(0, 0, 0),
            *batch.layers,
            *(0,) * (3 * len(batch.places)),
            *batch.counts,
            *lengths,
        )
        self._first_list = len(begin) + header[job.MOST_PIECES] * job.PIECE_COLUMNS
        self.integers = np.empty(self._first_list + most_lists * (1 + top_k) + num_coded, np.int64)
        self.integers[: len(begin)] = begin
        self._changes = struct.Struct(f"{job.HEADER - job.QUERIES + num_layers + 3 * len(batch.places)}q")
        self._memory = self.integers.data
        self.address = self.integers.ctypes.data

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return self.integers.nbytes + self._floats.nbytes + self._numbers.nbytes

    def begin(self, batch: SearchBatch, *addresses: int) -> None:
        """Takes a batch of the same shape. addresses: of its queries, and of where scores and positions go."""
        many = *addresses, *batch.layers, *batch.places, *batch.begins, *batch.ends
        self._changes.pack_into(self._memory, job.QUERIES * self.integers.itemsize, *many)

    def help(self, _: torch.Tensor) -> None:
        """Does some of it. Given the queries, so that they live as long as somebody may look at them."""
        help_scan(self.address)

    def is_left(self, num_helpers: int) -> bool:
        """Whether none of those who helped will look at it any more."""
        return not num_helpers or int(self.integers[job.NUM_LEFT]) == num_helpers

    def finish(self) -> None:
        """Does what others have begun and not done, on a copy, as they may still write to this one."""
        copied = self._copied()
        find_again(copied.address)

    def _copied(self) -> Table:
        """It as it is now: where a piece is done in the copy, its lists are whole."""
        other = copy.copy(self)
        first = self.integers[: self._first_list].copy()  # before the lists
        other.integers, other._floats = self.integers.copy(), self._floats.copy()
        other._numbers = self._numbers.copy()
        other.integers[: self._first_list] = first
        other.integers[[job.FLOATS, job.NUMBERS]] = other._floats.ctypes.data, other._numbers.ctypes.data
        other.address = other.integers.ctypes.data
        return other
