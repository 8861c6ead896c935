"""SpillFile: a sequence in a file while it has no place on the device; and the folder of these files.

    magic 8s | length of the head u32 | CRC-32 of the head u32
    head       JSON: name, counters and writers of the sequence; length and CRC-32 of what follows
    replies    what the writers were answered, see reply_bytes.py
    arrays     the slab's, each the live rows in the order of positions, layer by layer

Little-endian. Nobody reads such a file after the process that wrote it: a start removes them all, and what a durable
memory holds is in its log and snapshots. So nothing is synced; but everything is checked when it is read.
"""

from __future__ import annotations

import json
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memstore.errors import Corrupt
from memstore.reply_bytes import NUMBERS, a_count, encode_replies, found_writers, writers_entry

if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Sequence
    from pathlib import Path

    from memstore.seams import Buffer, Disk, ReadFile
    from memstore.sequence import Sequence as Stream
    from memstore.sequence import Writer

MAGIC = b"mSpill01"
_START = struct.Struct("<8sII")
_NONSENSE = (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration, RecursionError)
"""What a head raises that is none, though its checksum fits."""
Parts = list[list[memoryview]]
"""The bytes of each array, in parts."""


def content_of(name: str, sequence: Stream, arrays: Parts) -> list[Buffer]:
    """What a file of a sequence has, in parts."""
    replies = encode_replies(sequence)
    head = {
        "sequence": name,
        "epoch": sequence.epoch,
        "next_position": sequence.next_position,
        "writers": writers_entry(sequence),
        "replies": [len(replies), zlib.crc32(replies)],
        "arrays": [[sum(map(len, parts)), _crc(parts)] for parts in arrays],
    }
    text = json.dumps(head).encode()
    start = _START.pack(MAGIC, len(text), zlib.crc32(text))
    return [start, text, replies, *(part for parts in arrays for part in parts)]


@dataclass(frozen=True, slots=True)
class SpillFolder:
    """Where a memory has the files of its sequences, by number."""

    path: Path
    disk: Disk

    def write(self, number: int, content: Sequence[Buffer]) -> None:
        """A new file. Raises OSError, and there is no file then, but for one of that number that was there before."""
        file = self.disk.scratch(self._file(number))
        try:
            file.write(content)
        except OSError:
            self.remove(number)
            raise
        finally:
            file.close()

    def open(self, number: int, name: str) -> SpillFile:
        """The file of that number, of the sequence of that name. Raises Corrupt, OSError."""
        return SpillFile(self.disk.open(self._file(number)), name)

    def remove(self, number: int) -> None:
        """The file is gone; at the latest with the next start."""
        with suppress(OSError):
            self.disk.remove(self._file(number))

    def clear(self) -> None:
        """All of them are."""
        with suppress(OSError):
            self.disk.remove_folder(self.path)

    def _file(self, number: int) -> Path:
        return self.path / f"sequence-{number:08d}"


class SpillFile:
    """A file that is read; to be closed. Raises Corrupt where anything fails its check, and OSError."""

    def __init__(self, file: ReadFile, name: str) -> None:
        self._file = file
        self._name = name
        try:
            self._read_head()
        except BaseException:
            file.close()
            raise

    def _read_head(self) -> None:
        start = bytearray(_START.size)
        self._take(0, memoryview(start))
        magic, length, check = _START.unpack(start)
        if magic != MAGIC or _START.size + length > self._file.size:
            raise self._damage()
        text = bytearray(length)
        self._take(_START.size, memoryview(text))
        if zlib.crc32(text) != check:
            raise self._damage()
        self._replies_at = _START.size + length
        try:
            self._take_over(json.loads(text))
        except _NONSENSE as error:
            raise self._damage() from error

    def _take_over(self, head: dict[str, Any]) -> None:
        """What the head says, where it can be. Raises Corrupt, and what nonsense raises."""
        self.epoch, self.next_position = a_count(head["epoch"]), a_count(head["next_position"])
        self._writers = head["writers"]
        self._replies: tuple[int, int] = (a_count(head["replies"][0]), a_count(head["replies"][1]))
        self._arrays = [(a_count(length), a_count(check)) for length, check in head["arrays"]]
        if head["sequence"] != self._name or self._replies_at + self._replies[0] > self._file.size:
            raise self._damage()

    def writers(self) -> OrderedDict[str, Writer]:
        """What the writers were answered."""
        length, check = self._replies
        content = bytearray(length)
        self._take(self._replies_at, memoryview(content))
        if zlib.crc32(content) != check:
            raise self._damage()
        try:
            replies = np.frombuffer(content, np.uint64).reshape(-1, NUMBERS).tolist()
            return found_writers(self._writers, iter(replies))
        except _NONSENSE as error:
            raise self._damage() from error

    def read_into(self, arrays: Parts) -> None:
        """Fills the parts of each array, as they were when they were written."""
        offset = self._replies_at + self._replies[0]
        expected = self._arrays
        if [sum(map(len, parts)) for parts in arrays] != [length for length, _ in expected]:
            raise self._damage()
        for parts, (_, check) in zip(arrays, expected, strict=True):
            for part in parts:
                self._take(offset, part)
                offset += len(part)
            if _crc(parts) != check:
                raise self._damage()
        if offset != self._file.size:
            raise self._damage()

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()

    def _take(self, offset: int, target: memoryview) -> None:
        if self._file.read_into(offset, target) < len(target):
            raise self._damage()

    def _damage(self) -> Corrupt:
        return Corrupt(f"sequences[{self._name!r}]: the file that it was spilled to fails its check")


def _crc(parts: Sequence[memoryview]) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc
