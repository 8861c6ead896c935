"""Filed: the files of one memory's spilled sequences, by number, and how many bytes they have."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from memstore.errors import Corrupt, NotReady, QuotaExceeded
from memstore.spill_file import content_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memstore.seams import Buffer
    from memstore.sequence import Sequence as Stream
    from memstore.spill_file import Parts, SpillFile, SpillFolder


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


class Filed:
    """See above. Called by the device's thread, but for `opened`, `has`, and `remove_all`.

    folder: where they are; None where there can be none. allowance: of their bytes. is_filling: while what a start has
    found is put where it belongs; no allowance refuses that. num_refusals: how often a file could not be written.
    """

    def __init__(self) -> None:
        self.folder: SpillFolder | None = None
        self.allowance: Allowance = _Unbounded()
        self.is_filling = False
        self.num_bytes = 0
        self.num_refusals = 0
        self._lengths: dict[int, int] = {}
        self._next = 0
        self._rest: SpillFolder | None = None

    def write(self, name: str, sequence: Stream, parts: Parts, *, is_bounded: bool = True) -> int:
        """A new file of a sequence; its number. parts: its rows.

        Raises QuotaExceeded where there may be none, or no more bytes of them, OSError where it cannot be written.
        """
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
        number = self.number_of_none()
        self._lengths[number] = length
        self.num_bytes += length
        return number

    def number_of_none(self) -> int:
        """A number that no file has, nor will have: of a sequence of which there is nothing to be kept."""
        self._next += 1
        return self._next - 1

    def has(self, number: int) -> bool:
        """Whether there is a file of this number."""
        return number in self._lengths

    @contextmanager
    def opened(self, number: int, name: str) -> Iterator[SpillFile]:
        """The file of a sequence, to be read. Raises Corrupt where it fails, NotReady where it cannot be read now."""
        try:
            if self.folder is None:
                raise FileNotFoundError
            file = self.folder.open(number, name)
            try:
                yield file
            finally:
                file.close()
        except FileNotFoundError as error:
            raise Corrupt(f"sequences[{name!r}]: the file that it was spilled to is missing") from error
        except OSError as error:
            raise NotReady(f"sequences[{name!r}]: its file cannot be read ({error.strerror})") from error

    def remove(self, number: int) -> None:
        """The file is gone, if there was one."""
        if self.folder is not None and number in self._lengths:
            self.folder.remove(number)
            length = self._lengths.pop(number)
            self.num_bytes -= length
            self.allowance.give_back(length)

    def close(self) -> None:
        """Nothing is written any more; all of them go with `remove_all`."""
        self._rest, self.folder = self.folder, None

    def remove_all(self) -> None:
        """After `close`, in any thread: removes them, which may take long."""
        if self._rest is not None:
            self._rest.clear()
            self.allowance.give_back(self.num_bytes)
            self.num_bytes = 0

    def _create(self, folder: SpillFolder, content: Sequence[Buffer]) -> None:
        """Writes the next file. A number is passed over where a file has it that could not be removed."""
        while True:
            try:
                folder.write(self._next, content)
                return
            except FileExistsError:
                self._next += 1
