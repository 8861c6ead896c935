"""Tiers: what lies beyond the slab, in host memory and behind it in files, and the copies there and back.

All of host memory is reserved at creation. Between two calls one place in it is free, see Places.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from memstore import ring
from memstore.errors import Corrupt
from memstore.filed import Filed
from memstore.places import Places
from memstore.region import can_share
from memstore.reply_bytes import A_WRITER_BYTES
from memstore.slab import Slab, bytes_needed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memstore.sequence import Sequence as Stream
    from memstore.sequence import Writer
    from memstore.slab import StagedRows
    from memstore.spill_file import Parts
    from memstore.types import MemorySpec

HOST = torch.device("cpu")


def host_bytes(spec: MemorySpec) -> int:
    """Bytes of host memory that are reserved for spilled sequences of a memory of this spec."""
    return bytes_needed(_host_spec(spec)) + replies_room(spec) if spec.spill.max_sequences else 0


def replies_room(spec: MemorySpec) -> int:
    """How many of these are for what is kept of writers: as much as of one writer for each sequence that may lie there.

    All share it. Where it is full, sequences go on to files as where there is no place.
    """
    return spec.spill.host_sequences * A_WRITER_BYTES


def scratch_slab(spec: MemorySpec) -> Slab:
    """A slab in host memory with room for one sequence. Raises DeviceMemoryFull."""
    return Slab(replace(spec, max_sequences=1), HOST)


class Tiers:
    """See above. Called by the device's thread, but for `writers_of`, `read_rows` and `remove_files`.

    places: how places are counted. files: those of sequences that are in neither slab.
    """

    def __init__(self, spec: MemorySpec, slab: Slab) -> None:
        """Raises DeviceMemoryFull where the host has no room."""
        self.places = Places.of(spec)
        self.files = Filed()
        self._spec = spec
        self._slab = slab
        # beside a GPU in memory of its own pages, which can be pinned
        self._host = Slab(_host_spec(spec), HOST, is_shared=slab.device.type != HOST.type and can_share(HOST))
        self._host.pin(slab.device)
        self._free = [self.places.on_host(number) for number in reversed(range(self._host.num_places))]
        self._frozen: frozenset[int] = frozenset()
        self._limbo: list[int] = []

    @property
    def has_room(self) -> bool:
        """Whether a place in host memory is free."""
        return bool(self._free)

    def frees(self, place: int) -> bool:
        """Whether a place in host memory can be used again as soon as its sequence has gone from it."""
        return place not in self._frozen and not self.places.is_filed(place)

    def take(self) -> int:
        """A place in host memory; there is one that is free."""
        return self._free.pop()

    def copy_out(self, sequence: Stream) -> int:
        """Copies the rows of a sequence on the device to host memory; their place there. There is one that is free."""
        place = self.take()
        for run in self._runs(sequence):
            number = self.places.host_number(place)
            self._host.copy_place(sequence.place, number, run.slot, run.length, self._slab)
        return place

    def copy_in(self, name: str, sequence: Stream, target: int) -> None:
        """Copies the rows of a sequence from where it lies to this place on the device; its place is still the old one.

        One in a file passes through a place in host memory, which must be free, and gets back its writers. Raises
        Corrupt and NotReady where the file cannot be read; nothing is changed then.
        """
        if not self.places.is_filed(sequence.place):
            self._copy_to_device(sequence.place, sequence, target)
            return
        passing = self.take()
        try:
            self._settle()
            self.read_rows(name, sequence, self._host, self.places.host_number(passing))
            sequence.writers = self.writers_of(name, sequence)
            self._copy_to_device(passing, sequence, target)
        finally:
            self._free.append(passing)  # a copy from there may be under way; whoever writes there waits for it: _settle

    def file(self, name: str, sequence: Stream, place: int) -> int:
        """Moves a sequence from this place in host memory to a file; its place there. Raises as Filed.write.

        Nothing is changed where that raises.
        """
        self._settle()
        number = self.files.write(name, sequence, self._parts(self._host, self.places.host_number(place), sequence))
        self.drop(place)
        return self.places.filed(number)

    def refile(self, name: str, sequence: Stream, scratch: Slab) -> int:
        """A new file for one that has a file, with what lies in `scratch`; its new place. Raises OSError.

        No allowance is in the way: the other file goes next.
        """
        number = self.files.write(name, sequence, self._parts(scratch, 0, sequence), is_bounded=False)
        self.drop(sequence.place)
        return self.places.filed(number)

    def empty(self, place: int) -> int:
        """Drops a file whose sequence has neither rows nor writers any more; the place of one that has no file."""
        self.drop(place)
        return self.places.filed(self.files.number_of_none())

    def writers_of(self, name: str, sequence: Stream) -> OrderedDict[str, Writer]:
        """What the file of a sequence says of its writers. In any thread, while places are frozen.

        Raises Corrupt, NotReady.
        """
        number = self.places.file_number(sequence.place)
        if not self.files.has(number):
            return OrderedDict()  # it was reset where it lay
        with self.files.opened(number, name) as file:
            return file.writers() if file.epoch == sequence.epoch else OrderedDict()

    def read_rows(self, name: str, sequence: Stream, slab: Slab, place: int) -> None:
        """Reads the live rows of a sequence from its file into a place of a slab in host memory; as `writers_of`."""
        if not sequence.num_live(self._spec.capacity):
            return  # it was reset meanwhile
        with self.files.opened(self.places.file_number(sequence.place), name) as file:
            if file.next_position != sequence.next_position:
                raise Corrupt(f"sequences[{name!r}]: the file that it was spilled to is of another time")
            file.read_into(slab.parts(place, self._runs(sequence)))

    def write(self, place: int, rows: StagedRows, slots: torch.Tensor) -> None:
        """Puts rows into a place in host memory. slots: (n,) int64."""
        self._settle()
        self._host.write(rows, self._host.in_all_layers(self._cells(place, slots)))

    def rows(self, place: int, slots: torch.Tensor) -> StagedRows:
        """A copy of some rows in a place in host memory. slots: (n,) int64."""
        self._settle()
        return self._host.rows(self._cells(place, slots))

    def scratch(self) -> Slab:
        """See scratch_slab."""
        return scratch_slab(self._spec)

    def drop(self, place: int) -> None:
        """What lies there is of no use any more; where it is frozen, once it is not."""
        if place in self._frozen:
            self._limbo.append(place)
        elif self.places.is_filed(place):
            self.files.remove(self.places.file_number(place))
        else:
            self._free.append(place)

    def freeze(self, places: Iterable[int]) -> None:
        """What lies in these places stays as it is until `thaw`, whatever becomes of its sequences."""
        self._frozen = frozenset(place for place in places if not self.places.is_on_device(place))

    def thaw(self) -> None:
        """Nothing has to stay any more."""
        limbo, self._limbo, self._frozen = self._limbo, [], frozenset()
        for place in limbo:
            self.drop(place)

    def free(self) -> None:
        """Gives host memory back; nothing is spilled any more."""
        self._host.free()
        self.files.close()

    def remove_files(self) -> None:
        """After `free`, in any thread: removes what lies in files, which may take long."""
        self.files.remove_all()

    def _copy_to_device(self, place: int, sequence: Stream, target: int) -> None:
        """Copies live rows of a sequence from a place in host memory."""
        for run in self._runs(sequence):
            number = self.places.host_number(place)
            self._slab.copy_place(number, target, run.slot, run.length, self._host)

    def _cells(self, place: int, slots: torch.Tensor) -> torch.Tensor:
        return self.places.host_number(place) * self._spec.capacity + slots

    def _runs(self, sequence: Stream) -> Sequence[ring.Run]:
        return ring.runs(sequence.begin(self._spec.capacity), sequence.next_position, self._spec.capacity)

    def _parts(self, slab: Slab, place: int, sequence: Stream) -> Parts:
        """Where the live rows of a sequence lie in this place of a slab in host memory, array by array."""
        return slab.parts(place, self._runs(sequence))

    def _settle(self) -> None:
        """Waits for copies between host and device, before host memory is read or written by others than the device."""
        if self._slab.device.type == "cuda":
            torch.cuda.current_stream(self._slab.device).synchronize()


def _host_spec(spec: MemorySpec) -> MemorySpec:
    return replace(spec, max_sequences=spec.spill.host_sequences + 1)
