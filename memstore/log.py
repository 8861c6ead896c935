"""The append log of one memory: segments of checksummed records, and how a damaged one is told from a torn one.

A segment is a file of records, numbered on from the segment before. Its first record, the head, says whose log it is
and in which life of the machine it was written. A record is

    magic 4s | kind u32 | CRC-32 of the body | length of the body u64 | number u64 | synced u64 | CRC-32 of all that

and the body; CRCs are u32, and all is little-endian. `synced`: records below this number were on the disk for good when
this one was written.

Only the end of the log may be bad without being damage: a record that the file ends within (the process was killed
while it wrote), and after the machine went down anything from the first bad record on, unless a record behind it says
that it was synced.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memstore.errors import Corrupt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memstore.seams import AppendFile, Buffer, ReadFile

FORMAT = 1
MAGIC = b"mLog"
HEAD, STEP = 1, 2
_FIELDS = struct.Struct("<4sIIQQQ")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECK.size


@dataclass(frozen=True, slots=True)
class Record:
    """One record. body: valid until the next one is read."""

    kind: int
    number: int
    synced: int
    body: memoryview


@dataclass(frozen=True, slots=True)
class Head:
    """The first record of a segment. boot_id: the life of the machine it was written in.

    is_behind_loss: what was acknowledged before it may be gone; the record behind it gives new epochs.
    """

    identity: str
    boot_id: str
    is_behind_loss: bool = False


def frame(kind: int, number: int, synced: int, parts: Sequence[Buffer]) -> list[Buffer]:
    """A record as it is written: its header, and its body in parts."""
    crc, length = 0, 0
    for part in parts:
        crc = zlib.crc32(part, crc)
        length += len(part)
    fields = _FIELDS.pack(MAGIC, kind, crc, length, number, synced)
    return [fields + _CHECK.pack(zlib.crc32(fields)), *parts]


def write_head(file: AppendFile, head: Head, number: int, synced: int) -> None:
    """Begins a segment."""
    content = {"format": FORMAT, "identity": head.identity, "boot_id": head.boot_id}
    if head.is_behind_loss:
        content["is_behind_loss"] = True
    file.write(frame(HEAD, number, synced, [json.dumps(content).encode()]))


def read_head(record: Record, name: str) -> Head:
    """What a segment's first record says. Raises Corrupt."""
    try:
        content = json.loads(bytes(record.body))
        if record.kind == HEAD and content["format"] == FORMAT:
            is_behind_loss = bool(content.get("is_behind_loss", False))
            return Head(str(content["identity"]), str(content["boot_id"]), is_behind_loss)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"{name}: its head cannot be read") from error
    raise Corrupt(f"{name}: not a log of format {FORMAT}")


class SegmentReader:
    """Reads the records of one segment up to the first that is not whole."""

    def __init__(self, file: ReadFile) -> None:
        self._file = file
        self._buffer = bytearray(1 << 16)
        self.end = 0
        """Where the last whole record ends."""
        self.is_cut_short = False
        """The file ends within a record whose header is good, or within a header."""
        self.is_spoilt = False
        """A record fails its check, or has a wrong number."""

    def records(self, number: int | None) -> Iterator[Record]:
        """The records, the first of this number; None: of any."""
        while self.end < self._file.size:
            record = self.record_at(self.end)
            if record is None:
                return
            if number is not None and record.number != number:
                self.is_spoilt = True
                return
            number = record.number + 1
            self.end += HEADER_BYTES + len(record.body)
            yield record

    def synced_behind(self) -> int:
        """The largest `synced` of the whole records from `end` on, wherever they are; 0 where there are none."""
        rest = self._read(self.end, self._file.size - self.end)
        reader, most = SegmentReader(self._file), 0
        at = rest.find(MAGIC)
        places = []
        while at >= 0:
            places.append(self.end + at)
            at = rest.find(MAGIC, at + 1)
        for place in places:
            record = reader.record_at(place)
            if record is not None:
                most = max(most, record.synced)
        return most

    def record_at(self, offset: int) -> Record | None:
        """The record at `offset`; None where it is not whole, and why is noted."""
        header = self._read(offset, HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            self.is_cut_short = True
            return None
        magic, kind, crc, length, number, synced = _FIELDS.unpack_from(header)
        (check,) = _CHECK.unpack_from(header, _FIELDS.size)
        if magic != MAGIC or zlib.crc32(header[: _FIELDS.size]) != check:
            self.is_spoilt = True
            return None
        if offset + HEADER_BYTES + length > self._file.size:
            self.is_cut_short = True
            return None
        body = self._body(offset + HEADER_BYTES, length)
        if len(body) < length or zlib.crc32(body) != crc:
            self.is_spoilt = True
            return None
        return Record(kind, number, synced, body)

    def _read(self, offset: int, length: int) -> bytes:
        target = bytearray(length)
        return bytes(target[: self._file.read_into(offset, memoryview(target))])

    def _body(self, offset: int, length: int) -> memoryview:
        if length > len(self._buffer):
            self._buffer = bytearray(length)
        view = memoryview(self._buffer)[:length]
        return view[: self._file.read_into(offset, view)]
