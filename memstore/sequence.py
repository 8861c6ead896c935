"""Sequences: which exist, how far each is written, and what was answered to each writer.

A writer numbers its appends to a sequence from 0 within an epoch. The replies to the last 256 of them are kept, for the
64 writers that appended most recently: an append that is sent again is answered again and not applied.

A table has one of two homes: it is private to this process, and then a sequence in it may be lent to another one; or it
holds the sequences of a lease in the process that they are lent to (lent.py).
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice
from operator import neg
from typing import TYPE_CHECKING, NamedTuple

from memstore.errors import AlreadyExists, EpochChanged, NotFound, PositionExpired, QuotaExceeded, SequenceGap
from memstore.types import SequencePart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Sequence as SequenceOf

    from memstore.lease import Loan
    from memstore.types import StepBatch

REPLAY_WINDOW = 256
"""Appends of a (writer, sequence, epoch) whose answers are kept."""

MAX_WRITERS = 64
"""Writers of a sequence and epoch that are remembered; the one that appended longest ago is forgotten first."""


class Reply(NamedTuple):
    """What the first arrival of an append was answered. A tuple: a step makes one for every sequence.

    fingerprint: 0 where nobody computed it. begun_from: epoch it was sent with, if it began this one.
    """

    num_rows: int
    fingerprint: int
    as_of: int
    first_position: int
    begun_from: int | None = None


@dataclass(slots=True)
class Writer:
    """The appends of one writer: seq [next_seq - len(replies), next_seq) can be answered again."""

    next_seq: int = 0
    replies: OrderedDict[int, Reply] = field(default_factory=OrderedDict)

    def remember(self, reply: Reply) -> None:
        """Counts one append."""
        self.replies[self.next_seq] = reply
        self.next_seq += 1
        if len(self.replies) > REPLAY_WINDOW:
            self.replies.popitem(last=False)


@dataclass(slots=True)
class Sequence:
    """One stream of entries in all layers: its place and its one counter of positions.

    place: where its rows lie: in the slab on the device, or where it is spilled, in host memory or a file; see Places.
    floor: first position that this sequence was ever given, above 0 for one that was forked from a wrapped ring.
    is_pinned: it is neither spilled nor ended for being idle. num_appended: rows of a layer that this table's process
    has appended. loan: while another process has it. writers: empty for one in a file, which has them.
    """

    place: int
    epoch: int
    next_position: int = 0
    floor: int = 0
    writers: OrderedDict[str, Writer] = field(default_factory=OrderedDict)
    is_pinned: bool = False
    num_appended: int = field(default=0, compare=False)
    loan: Loan | None = field(default=None, compare=False)

    def num_live(self, capacity: int) -> int:
        """Positions that are live."""
        return self.next_position - self.begin(capacity)

    def refresh(self) -> None:
        """Takes over what the process that it is lent to has published. Raises Corrupt."""
        if self.loan is not None:
            progress = self.loan.progress()
            self.epoch, self.next_position, self.floor = progress.epoch, progress.next_position, progress.floor

    def begin(self, capacity: int) -> int:
        """The first live position."""
        oldest = self.next_position - capacity
        return oldest if oldest > self.floor else self.floor

    def restart(self, epoch: int) -> None:
        """Forgets everything; positions begin at 0 again."""
        self.epoch, self.next_position, self.floor = epoch, 0, 0
        self.writers.clear()

    def remember(self, writer: str, reply: Reply) -> None:
        """Counts one append of a writer, who is now the most recent one."""
        known = self.writers.get(writer)
        if known is None:
            known = self.writers[writer] = Writer()
            if len(self.writers) > MAX_WRITERS:
                self.writers.popitem(last=False)
        else:
            self.writers.move_to_end(writer)
        known.remember(reply)


class SequenceTable:
    """The sequences of one memory by name, each with a place of its own, in the slab or beyond it."""

    def __init__(self, num_places: int, num_beyond: int = 0) -> None:
        """num_places: of the slab. num_beyond: sequences that may lie beyond it."""
        self._by_name: dict[str, Sequence] = {}
        self._num_places = num_places
        self._num_beyond = num_beyond
        self._free_places = list(range(num_places - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_name.values())

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Sequence:
        return self._by_name[name]

    def items(self) -> Iterable[tuple[str, Sequence]]:
        """Every sequence with its name."""
        return self._by_name.items()

    def announce(self, names: SequenceOf[str]) -> None:
        """Told when the counters of these have moved, before their rows are written; a private table needs it not."""

    def publish(self, names: SequenceOf[str]) -> None:
        """Told when these have changed, and the writing of their rows has begun on the device; the same."""

    @property
    def num_free(self) -> int:
        """Sequences that can still begin to exist: each needs a place of the slab, and to be one of those in all."""
        return min(len(self._free_places), self._num_places + self._num_beyond - len(self._by_name))

    @property
    def num_free_places(self) -> int:
        """Places of the slab that nothing lies in."""
        return len(self._free_places)

    def places_of_new(self, names: SequenceOf[str]) -> Iterator[int]:
        """The places that sequences of these names will get if they are created in this order."""
        return islice(reversed(self._free_places), len(names))

    def get(self, name: str) -> Sequence | None:
        """The sequence of that name, if it exists, as it is now."""
        sequence = self._by_name.get(name)
        if sequence is not None and sequence.loan is not None:
            sequence.refresh()
            return sequence if sequence.epoch else None
        return sequence

    def epoch(self, name: str) -> int:
        """The epoch of the sequence of that name as `get` saw it last; 0 where there is none. Cannot fail."""
        sequence = self._by_name.get(name)
        return 0 if sequence is None else sequence.epoch

    def loan(self, name: str) -> Loan | None:
        """Who has the sequence of that name, if it is lent; it need not exist for that."""
        sequence = self._by_name.get(name)
        return None if sequence is None else sequence.loan

    def check_room(self, name: str) -> None:
        """Raises QuotaExceeded where no sequence of that name can begin to exist."""
        if not self.num_free:
            raise QuotaExceeded(f"sequences[{name!r}]: {len(self)} sequences exist, as many as the memory can hold")

    def create(self, name: str, epoch: int) -> Sequence:
        """A new, empty sequence in the lowest place that is free. Raises QuotaExceeded."""
        self.check_room(name)
        sequence = Sequence(self._free_places.pop(), epoch)
        self._by_name[name] = sequence
        return sequence

    def restore(self, name: str, sequence: Sequence) -> None:
        """Puts back a sequence into the place that it says. ValueError where that is taken, or there is none such."""
        if name in self._by_name:
            raise ValueError(f"sequence {name!r} stands twice")
        if sequence.place < self._num_places or not self._num_beyond:
            self._free_places.remove(sequence.place)
        self._by_name[name] = sequence

    def remove(self, name: str) -> None:
        """Ends a sequence that exists; its place is free."""
        self._free(self._by_name.pop(name).place)

    def vacate(self, name: str, place: int) -> None:
        """Moves a sequence to a place beyond the slab; its own is free."""
        sequence = self._by_name[name]
        before, sequence.place = sequence.place, place
        self._free(before)

    def occupy(self, name: str) -> None:
        """Moves a sequence to the lowest place of the slab that is free; there is one."""
        self._by_name[name].place = self._free_places.pop()

    def _free(self, place: int) -> None:
        if place < self._num_places:
            insort(self._free_places, place, key=neg)  # the lowest last


class PartPlan(NamedTuple):
    """What one part of a batch will do, decided before anything is changed. A tuple: a step makes many.

    sequence: None where it does not exist yet. begin, as_of: the range its retrieval sees. first_position: where its
    rows go, or went at the first arrival where this is a replay.
    """

    part: SequencePart
    sequence: Sequence | None
    fingerprint: int
    begin: int
    as_of: int
    first_position: int
    is_replay: bool = False

    @property
    def num_seen(self) -> int:
        """Positions that its retrieval sees."""
        return self.as_of - self.begin


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """A batch that fits the state, and what each of its parts will do."""

    batch: StepBatch
    parts: tuple[PartPlan, ...]

    @property
    def num_new(self) -> int:
        """Sequences that the batch brings into being."""
        return sum(part.sequence is None for part in self.parts) if self.batch.append else 0


def plan_part(
    part: SequencePart, sequence: Sequence | None, capacity: int, *, writer: str | None, fingerprint: int
) -> PartPlan:
    """Decides one part against the state. writer: None where nothing is appended, "" where appends are not numbered.

    Raises EpochChanged, SequenceGap, PositionExpired, AlreadyExists; nothing is changed in any case.
    """
    if writer:
        if sequence is not None and _goes_on(part, sequence, writer):  # as most do: nothing else needs to be asked
            published = sequence.next_position
            return PartPlan(part, sequence, fingerprint, sequence.begin(capacity), published, published)
        replay = _find_replay(part, sequence, writer, fingerprint)
        if sequence is not None and replay is not None:
            begin = min(sequence.begin(capacity), replay.as_of)
            return PartPlan(part, sequence, fingerprint, begin, replay.as_of, replay.first_position, is_replay=True)
    epoch = 0 if sequence is None else sequence.epoch
    if part.epoch not in (0, epoch):
        raise EpochChanged(part.sequence, part.epoch, epoch)
    if writer:
        _check_next_seq(part, sequence, writer)
    begin, published = 0, 0
    if sequence is not None and not part.start_of_sequence:
        begin, published = sequence.begin(capacity), sequence.next_position
    as_of = published if part.as_of is None else part.as_of
    if not 0 <= as_of <= published:
        raise PositionExpired(f"sequences[{part.sequence!r}].as_of: {as_of} given, {published} published")
    return PartPlan(part, sequence, fingerprint, min(begin, as_of), as_of, published)


def plan_fork(table: SequenceTable, source: str, target: str, as_of: int | None, epoch: int, capacity: int) -> PartPlan:
    """Decides a fork: what the target will get is what a retrieval of the source with `as_of` would see.

    Raises NotFound (source), AlreadyExists (target), EpochChanged, PositionExpired; nothing is changed in any case.
    """
    origin = table.get(source)
    if origin is None:
        raise NotFound(f"source: there is no sequence {source!r}")
    if table.get(target) is not None:
        raise AlreadyExists(f"target: sequence {target!r} exists")
    part = SequencePart(sequence=source, num_rows=0, epoch=epoch, as_of=as_of)
    return plan_part(part, origin, capacity, writer=None, fingerprint=0)


def _goes_on(part: SequencePart, sequence: Sequence, writer: str) -> bool:
    """True for an append that sees all and is the next one of its writer, in the epoch that it names."""
    known = sequence.writers.get(writer)
    is_next = known is not None and part.seq == known.next_seq and part.epoch == sequence.epoch
    return is_next and part.as_of is None and not part.start_of_sequence


def _find_replay(part: SequencePart, sequence: Sequence | None, writer: str, fingerprint: int) -> Reply | None:
    """The first answer to this append, if it is remembered."""
    known = None if sequence is None else sequence.writers.get(writer)
    reply = None if known is None else known.replies.get(part.seq)
    if sequence is None or known is None or reply is None:
        return None
    is_known_to_differ = 0 not in (reply.fingerprint, fingerprint) and reply.fingerprint != fingerprint
    is_same = reply.num_rows == part.num_rows and not is_known_to_differ
    if part.start_of_sequence:
        # It asks for a new epoch, so it is a resend only if it is what began the present one. Sent with epoch 0 that
        # cannot be told once more was appended; then it begins again, and so does all that is resent after it.
        is_first = reply.begun_from == part.epoch and (part.epoch != 0 or known.next_seq == 1)
        return reply if is_same and is_first else None
    if part.epoch not in (0, sequence.epoch):
        return None
    if not is_same:
        raise AlreadyExists(f"sequences[{part.sequence!r}].seq: {part.seq} was used with other rows")
    return reply


def _check_next_seq(part: SequencePart, sequence: Sequence | None, writer: str) -> None:
    known = None if sequence is None or part.start_of_sequence else sequence.writers.get(writer)
    expected = 0 if known is None else known.next_seq
    if part.seq > expected:
        raise SequenceGap(part.sequence, part.seq, expected)
    if part.seq < expected:
        raise PositionExpired(
            f"sequences[{part.sequence!r}].seq: {part.seq} is no longer remembered", expected_seq=expected
        )
