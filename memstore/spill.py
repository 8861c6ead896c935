"""Spill: the sequences of a memory that have no place on its device: how they leave it, lie, and return."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from memstore.arrivals import Arrivals
from memstore.errors import DeviceMemoryFull, MemstoreError, QuotaExceeded
from memstore.reply_bytes import held_bytes
from memstore.tiers import Tiers, host_bytes, replies_room
from memstore.types import NO_ROOM, SpillCounts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memstore.sequence import Sequence, SequenceTable
    from memstore.slab import Slab
    from memstore.still import Pictures
    from memstore.types import MemorySpec


class Spill:
    """Those that are away. Each goes to host memory; when that is full, the one longest there goes on to a file.

    Between two calls a place in host memory is free, but while a snapshot is taken: what the snapshot has still to see
    stays where it is.
    """

    def __init__(self, spec: MemorySpec, slab: Slab, table: SequenceTable, pictures: Pictures) -> None:
        """Raises DeviceMemoryFull where the host has no room."""
        self.tiers = pictures.tiers = Tiers(spec, slab)
        self.arrivals = Arrivals(self.tiers, self._arrive)
        self.away: OrderedDict[str, float] = OrderedDict()
        """When each was used, monotonic seconds; in the order in which they left, or were emptied where they are."""
        self._spec = spec
        self._table = table
        self._pictures = pictures
        self._hosted: OrderedDict[str, int] = OrderedDict()  # bytes of what is kept of the writers of each
        self._writer_bytes = 0
        self._writers_room = replies_room(spec)
        self._num_spills = self._num_returns = 0

    def leave(self, name: str, used_at: float, returning: str | None) -> None:
        """Takes a sequence from its place on the device. returning: one that is away, and will come back next.

        Raises QuotaExceeded where it can lie nowhere else, OSError where a file cannot be written; nothing is changed
        then.
        """
        self._see_to_room()
        sequence = self._table[name]
        place = self.tiers.copy_out(sequence)
        writer_bytes = held_bytes(sequence)
        try:
            is_room_coming = returning is not None and self.tiers.frees(self._table[returning].place)
            has_place = self.tiers.has_room or is_room_coming or self._file_oldest(returning)
            if not (has_place and self._see_to_writers(writer_bytes, returning)):
                self._check_files(has_place=has_place)
                place = self.tiers.file(name, sequence, place)
                sequence.writers = OrderedDict()
        except (MemstoreError, OSError):
            self.tiers.drop(place)
            raise
        self._table.vacate(name, place)
        self.away[name] = used_at
        if not self.tiers.places.is_filed(place):
            self._host(name, writer_bytes)
        self._num_spills += 1

    def come_back(self, name: str) -> None:
        """Gives a sequence a place on the device; one is free.

        Raises Corrupt, NotReady, QuotaExceeded, DeviceMemoryFull, and OSError as `leave`; it stays away then.
        """
        sequence = self._table[name]
        before = sequence.place
        if self.tiers.places.is_filed(before):
            self._see_to_room()
        (place,) = self._table.places_of_new([name])
        capacity = self._spec.capacity
        try:
            self._pictures.preserve_rows(place, sequence.begin(capacity), sequence.num_live(capacity))
        except NO_ROOM as error:
            raise DeviceMemoryFull("no working memory is left on the device; nothing was changed") from error
        self.tiers.copy_in(name, sequence, place)
        self._table.occupy(name)
        self.tiers.drop(before)
        self._unhost(name)
        del self.away[name]
        self._num_returns += 1

    def empty(self, name: str) -> None:
        """A sequence, which may be away, was reset where it is: nothing of it is left."""
        sequence = self._table[name]
        if self.tiers.places.is_filed(sequence.place):
            sequence.place = self.tiers.empty(sequence.place)
        elif name in self._hosted:
            self._host(name, 0)

    def forget(self, name: str) -> None:
        """A sequence, which may be away, is about to end."""
        if self.away.pop(name, None) is not None:
            self._unhost(name)
            self.tiers.drop(self._table[name].place)

    def restore(self, sequences: Mapping[str, Sequence], now: float) -> None:
        """Takes note of those of a snapshot that are away; `arrivals` is given their rows next. Raises as `leave`.

        ValueError: there are more than the memory has room for.
        """
        coming = {name: each for name, each in sequences.items() if not self.tiers.places.is_on_device(each.place)}
        if len(coming) > self._spec.spill.max_sequences:
            raise ValueError("more sequences than the memory has room for")
        self.away.update((name, now) for name in coming)
        self.arrivals.expect(coming, self._spec.capacity)

    def mend(self, name: str, found: Sequence, scratch: Slab) -> None:
        """See Lifecycle.mend."""
        sequence = self._table.get(name)
        if sequence is not None and (sequence.place, sequence.epoch) == (found.place, found.epoch):
            sequence.place = self.tiers.refile(name, found, scratch)

    def counts(self) -> SpillCounts:
        """Of this moment."""
        return SpillCounts(
            num_resident=len(self._table) - len(self.away),
            num_on_host=len(self._hosted),
            num_on_disk=len(self.away) - len(self._hosted),
            host_bytes=host_bytes(self._spec),
            disk_bytes=self.tiers.files.num_bytes,
            spills=self._num_spills,
            returns=self._num_returns,
            refusals=self.tiers.files.num_refusals,
        )

    def _see_to_room(self) -> None:
        """Room in host memory to pass through. Raises QuotaExceeded, OSError."""
        if not self.tiers.has_room and not self._file_oldest(None):
            raise QuotaExceeded("sequences: no place is free, and none in host memory until a snapshot is taken")

    def _file_oldest(self, but: str | None) -> bool:
        """Makes room in host memory by moving what is longest there to a file; whether there was any that could go.

        but: one that stays. Raises QuotaExceeded, OSError; nothing is changed then.
        """
        for name in self._hosted:
            sequence = self._table[name]
            if name != but and self.tiers.frees(sequence.place):
                sequence.place = self.tiers.file(name, sequence, sequence.place)
                sequence.writers = OrderedDict()
                self._unhost(name)
                return True
        return False

    def _check_files(self, *, has_place: bool) -> None:
        """Raises QuotaExceeded where there is a place in host memory, but nothing else for what has no room beside."""
        if has_place and self.tiers.files.folder is None:
            raise QuotaExceeded(
                "sequences: no place is free, host memory has no room for what is kept of writers of more of them, and "
                "this server has no folder to spill sequences to"
            )

    def _see_to_writers(self, num_bytes: int, but: str | None) -> bool:
        """Makes room in host memory for what is kept of a sequence's writers, as `_file_oldest`; whether there is."""
        if num_bytes > self._writers_room:
            return False  # nobody need go for it
        coming = 0 if but is None else self._hosted.get(but, 0)
        while self._writer_bytes - coming + num_bytes > self._writers_room:
            if not self._file_oldest(but):
                return False
        return True

    def _host(self, name: str, writer_bytes: int) -> None:
        """A sequence is in host memory, with so much that is kept of its writers."""
        self._writer_bytes += writer_bytes - self._hosted.get(name, 0)
        self._hosted[name] = writer_bytes

    def _unhost(self, name: str) -> None:
        """A sequence is there no more, if it was."""
        self._writer_bytes -= self._hosted.pop(name, 0)

    def _arrive(self, name: str, place: int) -> None:
        """All rows of a sequence of a snapshot are in this place in host memory. Makes room for the next one."""
        sequence = self._table[name]
        sequence.place = place
        self._host(name, held_bytes(sequence))
        self._see_to_writers(0, None)
        if not self.tiers.has_room:
            self._file_oldest(None)
