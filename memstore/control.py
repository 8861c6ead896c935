"""ControlBlock: how far the sequences of one lease are written, in memory that its holder and the server share.

    header    64 words of 8 bytes: magic, layout, lease (0 once it has ended), number of sequences, turn
    copies    2 x (sequences, 4) words: epoch, next position, floor, rows appended under the lease
    states    a cell of 32 KiB a sequence: its whole state when it is lent and given back, after its length

The holder writes the copy that is not read and then the turn, one aligned word: whenever it dies, a whole copy is
there. Rows that are about to be overwritten are below the floor of a copy before they are, and new rows are there
before a copy counts them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memstore.errors import Corrupt
from memstore.region import make_region, map_region

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from memstore.region.base import Region

LAYOUT = 1
"""Version of the layout of slab and control block."""
STATE_BYTES = 32 << 10
MAX_POSITION = 1 << 53

_MAGIC = 0x6D656D73746F7265
_HEADER_BYTES = 512
_WORD_BYTES = 8
_FIELDS = 4
_LEASE, _TURN = 2, 4
_TRIES = 1000
_HOST = torch.device("cpu")
_fence = threading.Lock()
"""Taken and given between two stores that others must see in their order; x86 keeps that by itself."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is published of one sequence.

    epoch: 0 where it does not exist yet. num_appended: rows of a layer, since the sequence was lent.
    """

    epoch: int
    next_position: int
    floor: int
    num_appended: int


class ControlBlock:
    """See above. The server makes it; only the holder of the lease writes it, but for the end of the lease."""

    def __init__(self, region: Region, num_sequences: int) -> None:
        self.region = region
        self.num_sequences = num_sequences
        self.lease = 0
        copies_end = _HEADER_BYTES + 2 * num_sequences * _FIELDS * _WORD_BYTES
        words: NDArray[np.int64] = region.content[:copies_end].view(torch.int64).numpy()
        self._header = words[: _HEADER_BYTES // _WORD_BYTES].data  # whose words are read and written in one step each
        self._copies = words[_HEADER_BYTES // _WORD_BYTES :].reshape(2, num_sequences, _FIELDS)
        self._halves = [copy.data.cast("B") for copy in self._copies]
        self._states = region.content[copies_end:].numpy().reshape(num_sequences, STATE_BYTES)

    @classmethod
    def make(cls, lease: int, num_sequences: int) -> ControlBlock:
        """A new block of this lease. Raises OSError."""
        block = cls(make_region(block_bytes(num_sequences), _HOST), num_sequences)
        for at, word in enumerate((_MAGIC, LAYOUT, lease, num_sequences)):
            block._header[at] = word
        block.lease = lease
        return block

    @classmethod
    def map(cls, descriptor: int, num_sequences: int) -> ControlBlock:
        """The block that another process made. Raises OSError, Corrupt."""
        block = cls(map_region(descriptor, block_bytes(num_sequences), _HOST), num_sequences)
        magic, layout, block.lease, count = block._header[:4]
        if (magic, layout, count) != (_MAGIC, LAYOUT, num_sequences):
            block.close()
            raise Corrupt("not a control block of this layout")
        return block

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return block_bytes(self.num_sequences)

    @property
    def is_held(self) -> bool:
        """True until the server has ended the lease."""
        return self.lease != 0 and self._header[_LEASE] == self.lease

    def end(self) -> None:
        """Ends the lease: its holder writes nothing from now on."""
        self._header[_LEASE] = 0

    def publish(self, table: NDArray[np.int64]) -> None:
        """Makes (sequences, 4), row-major, what is published, all of it at once."""
        turn = self._header[_TURN] + 1
        self._halves[turn & 1][:] = table.data.cast("B")
        with _fence:
            self._header[_TURN] = turn

    def table(self) -> NDArray[np.int64]:
        """A copy of what is published, (sequences, 4)."""
        for turn in self._turns():
            table: NDArray[np.int64] = self._copies[turn & 1].copy()
            if self._is_still(turn):
                return table
        raise Corrupt("the holder of a lease never stops writing")

    def progress(self, index: int) -> Progress:
        """What is published of one sequence. Corrupt where that cannot be."""
        for turn in self._turns():
            epoch, end, floor, appended = self._copies[turn & 1, index].tolist()
            if self._is_still(turn):
                break
        else:
            raise Corrupt("the holder of a lease never stops writing")
        if epoch < 0 or not all(0 <= counter < MAX_POSITION for counter in (end, floor, appended)):
            raise Corrupt("the holder of a lease has written counters that cannot be")
        return Progress(epoch, end, min(floor, end), appended)

    def _turns(self) -> Iterator[int]:
        """The turn, again and again, for as often as an honest holder can overtake a reader."""
        for _ in range(_TRIES):
            yield self._header[_TURN]

    def _is_still(self, turn: int) -> bool:
        """True where the copy that was just read is still not being written to."""
        with _fence:
            return self._header[_TURN] == turn

    def put_state(self, index: int, content: bytes) -> bool:
        """Leaves the whole state of a sequence; False where it is too long."""
        if len(content) > STATE_BYTES - _WORD_BYTES:
            return False
        cell = self._states[index]
        cell[_WORD_BYTES : _WORD_BYTES + len(content)].data[:] = content
        cell[:_WORD_BYTES].data[:] = len(content).to_bytes(_WORD_BYTES, "little")
        return True

    def state(self, index: int) -> bytes:
        """What was left of a sequence. Corrupt where that cannot be."""
        cell = self._states[index]
        length = int.from_bytes(cell[:_WORD_BYTES].tobytes(), "little")
        if length > STATE_BYTES - _WORD_BYTES:
            raise Corrupt("a state in a control block leaves its cell")
        return bytes(cell[_WORD_BYTES : _WORD_BYTES + length])

    def close(self) -> None:
        """Gives up the mapping."""
        del self._header, self._halves, self._copies, self._states
        self.region.close()


def block_bytes(num_sequences: int) -> int:
    """Length of the block of so many sequences."""
    return _HEADER_BYTES + num_sequences * (2 * _FIELDS * _WORD_BYTES + STATE_BYTES)
