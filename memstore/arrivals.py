"""Arrivals: sequences of a snapshot that have no place on the device, while a start reads their rows.

A snapshot says where they lay in the process that took it. Here that place only tells them apart: they get new ones.
Their rows come one sequence after the other, each oldest first. So one place in host memory is filled at a time, and
when it holds all rows of its sequence, the sequence has arrived, and may go on to a file before the next one comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memstore.errors import Corrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from memstore.sequence import Sequence
    from memstore.slab import StagedRows
    from memstore.tiers import Tiers


@dataclass(frozen=True, slots=True)
class _Coming:
    """The sequence whose rows are being read, by its place in the snapshot; and the place in host memory they go to."""

    place: int
    host_place: int


class Arrivals:
    """See above. Where two are mixed, or one is not whole, the snapshot is Corrupt."""

    def __init__(self, tiers: Tiers, arrived: Callable[[str, int], None]) -> None:
        """arrived: is told the name and the place in host memory of each that is there; it may raise."""
        self._tiers = tiers
        self._arrived = arrived
        self._expected: dict[int, tuple[str, Sequence]] = {}
        self._coming: _Coming | None = None

    def expect(self, sequences: Mapping[str, Sequence], capacity: int) -> None:
        """These are to come; those of them without rows are there at once."""
        for name, sequence in sequences.items():
            if sequence.place in self._expected:
                raise Corrupt("the snapshot has two sequences in one place")
            if sequence.num_live(capacity):
                self._expected[sequence.place] = name, sequence
            else:
                self._arrived(name, self._tiers.take())

    def put(self, place: int, end: int, rows: StagedRows, slots: torch.Tensor) -> None:
        """Takes rows of a sequence, those in front of position `end`, which go into these slots of its new place."""
        if place not in self._expected:
            raise Corrupt("the snapshot has rows of a sequence that it does not have")
        if self._coming is None:
            self._coming = _Coming(place, self._tiers.take())
        if self._coming.place != place:
            raise Corrupt("the snapshot mixes rows of two sequences")
        self._tiers.write(self._coming.host_place, rows, slots)
        name, sequence = self._expected[place]
        if end == sequence.next_position:
            host_place = self._coming.host_place
            self._coming = None
            del self._expected[place]
            self._arrived(name, host_place)

    def check_whole(self) -> None:
        """After the last `put`."""
        if self._expected:
            name = min(name for name, _ in self._expected.values())
            raise Corrupt(f"sequences[{name!r}]: the snapshot lacks rows of it")
