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

    def stamp(self, part: pb.SequencePart, append: bool) -> int:
        """Gives one part its epoch and, where rows are appended, the next seq; gives back what was the next seq.

        A part that starts a sequence is number 0 of the new epoch.
        """
        place = self._places[part.sequence]
        before = place.next_seq
        if part.start_of_sequence:
            place.next_seq = 0
        part.epoch = place.epoch
        part.seq = place.next_seq
        place.next_seq += append
        return before

    def take_back(self, part: pb.SequencePart, before: int) -> None:
        """Makes the seq of a part that was refused free again, unless a later one was given out since."""
        place = self._places[part.sequence]
        if place.next_seq <= part.seq + 1:
            place.next_seq = before

    def acknowledge(self, request: pb.StepRequest, results: Sequence[pb.SequenceResult]) -> None:
        """Learns the epochs that an answered step left its sequences in."""
        for part, result in zip(request.sequences, results, strict=True):
            self._places[part.sequence].epoch = result.epoch

    def adopt(self, name: str, epoch: int) -> None:
        """Begins again at seq 0 in an epoch that was not known."""
        self._places[name] = Place(epoch=epoch)
