"""Numbering: the epoch and the next seq of each sequence of a session, as the client believes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memstore.v1 import memstore_pb2 as pb


@dataclass(slots=True)
class Place:
    """One sequence. epoch: 0 while not known; nothing was appended then. next_seq: number of the next append."""

    epoch: int = 0
    next_seq: int = 0


class Numbering:
    """Gives the parts of a step their epochs and seqs, and learns from the answers."""

    def __init__(self, names: Iterable[str]) -> None:
        self._places = {name: Place() for name in names}

    def epoch(self, name: str) -> int:
        """The epoch the sequence is believed to be in; 0 if not known."""
        return self._places[name].epoch

    def stamp(self, parts: Iterable[pb.SequencePart], append: bool) -> dict[str, int]:
        """Gives parts their epochs and, where rows are appended, the next seqs; gives back what were the next seqs.

        A part that starts a sequence is number 0 of the new epoch; of one that does not exist nothing need be emptied.
        """
        before: dict[str, int] = {}
        for part in parts:
            name = part.sequence
            place = self._places[name]
            before[name] = place.next_seq
            if part.start_of_sequence:
                if place.epoch:
                    place.next_seq = 0
                else:
                    part.start_of_sequence = False
            part.epoch = place.epoch
            part.seq = place.next_seq
            place.next_seq += append
        return before

    def take_back(self, part: pb.SequencePart, before: int) -> None:
        """Makes the seq of a part that was refused free again, unless a later one was given out since."""
        place = self._places[part.sequence]
        if place.next_seq <= part.seq + 1:
            place.next_seq = before

    def acknowledge(self, parts: Sequence[pb.SequencePart], results: Sequence[pb.SequenceResult]) -> None:
        """Learns the epochs that an answered step left its sequences in."""
        for part, result in zip(parts, results, strict=True):
            self._places[part.sequence].epoch = result.epoch

    def adopt(self, name: str, epoch: int) -> None:
        """Begins again at seq 0 in an epoch that was not known."""
        self._places[name] = Place(epoch=epoch)
