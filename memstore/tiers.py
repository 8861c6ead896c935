"""Tiers: where the sequences of a memory lie that have no place on its device: in host memory, and behind it in files.

Places go on beyond the slab's P: H + 1 of them are in host memory, and each of those behind is a file.

    [0, P) device | [P, P + H] host memory | [P + H + 1, ...) files, each number used once

One place in host memory more than sequences may stay there is what they pass through on their way to a file and back,
and while two change places. All of host memory is reserved at creation.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from memstore import ring
from memstore.errors import Corrupt, NotReady, QuotaExceeded
from memstore.reply_bytes import A_WRITER_BYTES
from memstore.slab import Slab, bytes_needed
from memstore.spill_file import content_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from memstore.seams import Buffer
    from memstore.sequence import Sequence as Stream
    from memstore.sequence import Writer
    from memstore.slab import StagedRows
    from memstore.spill_file import Parts, SpillFile, SpillFolder
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


class Allowance(Protocol):
    """Bytes of files that a memory may have. Any thread."""

    def take(self, num_bytes: int, *, is_bounded: bool) -> None:
        """Counts so many more. QuotaExceeded, and they are not, where that is too much; never unless `is_bounded`."""

    def give_back(self, num_bytes: int) -> None:
        """So many of them are gone."""


class _Unbounded:
    """As many as the disk has."""

    def take(self, num_bytes: int, *, is_bounded: bool) -> None:
        """It is taken."""

    def give_back(self, num_bytes: int) -> None:
        """Nobody counts."""


class Tiers:
    """Places beyond the slab, and the copies there and back. Called by the device's thread, but for
    `writers_of` and `read_rows`.

    folder: of the files; None where all that may be spilled has room in host memory. allowance: of their bytes.
    is_filling: while what a start has found is put where it belongs; whatever the allowance, it is not refused then.
    num_refusals: how often a file could not be written.
    """

    def __init__(self, spec: MemorySpec, slab: Slab) -> None:
        """Raises DeviceMemoryFull where the host has no room."""
        self.folder: SpillFolder | None = None
        self._rest: SpillFolder | None = None
        self.allowance: Allowance = _Unbounded()
        self.is_filling = False
        self.disk_bytes = 0
        self.num_refusals = 0
        self._spec = spec
        self._slab = slab
        self._host = Slab(_host_spec(spec), HOST)
        self._host.pin(slab.device)
        self._first = spec.max_sequences
        self._first_file = self._first + self._host.num_places
        self._free = list(range(self._first_file - 1, self._first - 1, -1))
        self._num_filed = 0
        self._lengths: dict[int, int] = {}
        self._frozen: frozenset[int] = frozenset()
        self._limbo: list[int] = []

    @property
    def has_room(self) -> bool:
        """Whether a place in host memory is free."""
        return bool(self._free)

    def is_filed(self, place: int) -> bool:
        """Whether it is a file's."""
        return place >= self._first_file

    def frees(self, place: int) -> bool:
        """Whether a place in host memory can be used again as soon as its sequence has gone from it."""
        return place not in self._frozen and not self.is_filed(place)

    def take(self) -> int:
        """A place in host memory; there is one that is free."""
        return self._free.pop()

    def copy_out(self, sequence: Stream) -> int:
        """Copies the rows of a sequence on the device to host memory; their place there. There is one that is free."""
        place = self.take()
        for run in self._runs(sequence):
            self._host.copy_place(sequence.place, place - self._first, run.slot, run.length, self._slab)
        return place

    def file(self, name: str, sequence: Stream, place: int) -> int:
        """Moves a sequence from this place in host memory to a file; its place there.

        Raises QuotaExceeded where there may be no files, OSError where one cannot be written; nothing is changed then.
        """
        self._settle()
        target = self._write(name, sequence, self._parts(self._host, place - self._first, sequence))
        self.drop(place)
        return target

    def refile(self, name: str, sequence: Stream, scratch: Slab) -> int:
        """A new file for one that has a file, with what lies in `scratch`; its new place. Raises OSError.

        No allowance is in the way: the other file goes next.
        """
        target = self._write(name, sequence, self._parts(scratch, 0, sequence), is_bounded=False)
        self.drop(sequence.place)
        return target

    def _write(self, name: str, sequence: Stream, parts: Parts, *, is_bounded: bool = True) -> int:
        if self.folder is None:
            raise QuotaExceeded("sequences: no place is free, and this server has no folder to spill sequences to")
        content = content_of(name, sequence, parts)
        length = sum(map(len, content))
        try:
            self.allowance.take(length, is_bounded=is_bounded and not self.is_filling)
            try:
                self._create(self.folder, content)
            except BaseException:
                self.allowance.give_back(length)
                raise
        except (QuotaExceeded, OSError):
            self.num_refusals += 1
            raise
        target = self._next_file()
        self._lengths[target] = length
        self.disk_bytes += length
        return target

    def _create(self, folder: SpillFolder, content: Sequence[Buffer]) -> None:
        """Writes the next file. A number is passed over where a file has it that could not be removed."""
        while True:
            try:
                folder.write(self._num_filed, content)
                return
            except FileExistsError:
                self._num_filed += 1

    def empty(self, place: int) -> int:
        """Drops a file whose sequence has neither rows nor writers any more; the place of one that has no file."""
        self.drop(place)
        return self._next_file()

    def copy_in(self, name: str, sequence: Stream, place: int) -> None:
        """Copies what lies at a sequence's place beyond the slab to this place of it, and gives it its writers again.

        For one in a file a place in host memory must be free. Raises Corrupt and NotReady where the file cannot be
        read; nothing is changed then.
        """
        source = sequence.place
        if self.is_filed(source):
            source = self.take()
            try:
                self._settle()
                self.read_rows(name, sequence, self._host, source - self._first)
                sequence.writers = self.writers_of(name, sequence)
            finally:
                self._free.append(source)
        for run in self._runs(sequence):
            self._slab.copy_place(source - self._first, place, run.slot, run.length, self._host)

    def writers_of(self, name: str, sequence: Stream) -> OrderedDict[str, Writer]:
        """What the file of a sequence says of its writers. In any thread, while places are frozen."""
        if sequence.place not in self._lengths:
            return OrderedDict()
        with self._opened(name, sequence.place) as file:
            return file.writers() if file.epoch == sequence.epoch else OrderedDict()

    def read_rows(self, name: str, sequence: Stream, slab: Slab, place: int) -> None:
        """Reads the live rows of a sequence from its file into a place of a slab in host memory; as `writers_of`."""
        if not sequence.num_live(self._spec.capacity):
            return  # it was reset meanwhile
        with self._opened(name, sequence.place) as file:
            if file.next_position != sequence.next_position:
                raise Corrupt(f"sequences[{name!r}]: the file that it was spilled to is of another time")
            file.read_into(slab.parts(place, self._runs(sequence)))

    @contextmanager
    def _opened(self, name: str, place: int) -> Iterator[SpillFile]:
        """The file of a sequence. Raises Corrupt, NotReady."""
        try:
            if self.folder is None:
                raise FileNotFoundError
            file = self.folder.open(place - self._first_file, name)
            try:
                yield file
            finally:
                file.close()
        except FileNotFoundError as error:
            raise Corrupt(f"sequences[{name!r}]: the file that it was spilled to is missing") from error
        except OSError as error:
            raise NotReady(f"sequences[{name!r}]: its file cannot be read ({error.strerror})") from error

    def write(self, place: int, rows: StagedRows, cells: torch.Tensor) -> None:
        """Puts rows into a place in host memory. cells: (n,) int64, slots of it."""
        self._settle()
        self._host.write(rows, self._host.in_all_layers((place - self._first) * self._spec.capacity + cells))

    def rows(self, place: int, slots: torch.Tensor) -> StagedRows:
        """A copy of some rows in a place in host memory. slots: (n,) int64."""
        self._settle()
        return self._host.rows((place - self._first) * self._spec.capacity + slots)

    def scratch(self) -> Slab:
        """See scratch_slab."""
        return scratch_slab(self._spec)

    def drop(self, place: int) -> None:
        """What lies there is of no use any more; where it is frozen, once it is not."""
        if place in self._frozen:
            self._limbo.append(place)
        elif not self.is_filed(place):
            self._free.append(place)
        elif self.folder is not None and place in self._lengths:
            self.folder.remove(place - self._first_file)
            length = self._lengths.pop(place)
            self.disk_bytes -= length
            self.allowance.give_back(length)

    def freeze(self, places: Iterable[int]) -> None:
        """What lies in these places stays as it is until `thaw`, whatever becomes of its sequences."""
        self._frozen = frozenset(place for place in places if place >= self._first)

    def thaw(self) -> None:
        """Nothing has to stay any more."""
        limbo, self._limbo, self._frozen = self._limbo, [], frozenset()
        for place in limbo:
            self.drop(place)

    def free(self) -> None:
        """Gives host memory back; nothing is spilled any more."""
        self._host.free()
        self._rest, self.folder = self.folder, None

    def remove_files(self) -> None:
        """After `free`, in any thread: removes what lies in files, which may take long."""
        if self._rest is not None:
            self._rest.clear()
            self.allowance.give_back(self.disk_bytes)
            self.disk_bytes = 0

    def _next_file(self) -> int:
        self._num_filed += 1
        return self._first_file + self._num_filed - 1

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
