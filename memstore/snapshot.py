"""Snapshots: a whole memory in a folder of plain arrays and a JSON manifest; written, checked, and read back.

    rows.bin        the live rows, chunk by chunk, each as RowFormat has it: some positions of one sequence, all layers
    replies.bin     what the writers were answered, uint64 [replies, 6], in the order of the manifest
    manifest.json   what they are: spec, sequences, where each chunk belongs; CRC-32 of every chunk and of each file

The manifest has a SHA-256 over itself, and is accepted only byte for byte as this module writes it. Nothing here is
executed or trusted: a snapshot is checked as it is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from memstore.errors import Corrupt, NotReady
from memstore.folder import FIRST_SEGMENT
from memstore.logs import trouble
from memstore.reply_bytes import NUMBERS, a_count, a_name, encode_replies, found_writers, writers_entry
from memstore.row_bytes import RowFormat
from memstore.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from memstore.folder import MemoryFolder
    from memstore.seams import Disk
    from memstore.still import Piece, Rescue, Still
    from memstore.types import MemorySpec

FORMAT = 1
MANIFEST, ROWS, REPLIES = "manifest.json", "rows.bin", "replies.bin"
REPLY_CHUNK_BYTES = 8 * NUMBERS << 16
"""One chunk of replies.bin: 65,536 replies."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a snapshot holds beside rows. number: of the first record of the log that is not in it."""

    identity: str
    number: int
    appended_rows: int
    evicted_rows: int
    sequences: Mapping[str, Sequence]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of rows.bin. sequence: its name."""

    sequence: str
    position: int
    num_rows: int
    crc: int


class _Writing:
    """One file of a snapshot while it is written."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._file = disk.create(path)
        self.crc = 0

    def chunk(self, parts: Iterable[memoryview]) -> int:
        """Adds a chunk; its CRC-32."""
        crc, given = 0, list(parts)
        for part in given:
            crc = zlib.crc32(part, crc)
            self.crc = zlib.crc32(part, self.crc)
        self._file.write(given)
        return crc

    def close(self) -> dict[str, int]:
        """Syncs the file; what the manifest says about it."""
        try:
            self._file.sync()
            return {"bytes": self._file.size, "crc32": self.crc}
        finally:
            self._file.close()


class Source(Protocol):
    """Where what is written comes from."""

    def take(self, piece: Piece) -> list[memoryview]:
        """A piece of the picture. Raises Corrupt and NotReady, of a filed one where its file cannot be read."""

    def salvage(self, names: list[str]) -> Rescue:
        """Other rows and writers of sequences whose files cannot be read. Raises Corrupt, NotReady, OSError."""


def write(disk: Disk, folder: Path, state: State, still: Still, source: Source) -> None:
    """Writes a snapshot into a new folder, its last file being the manifest.

    Raises OSError, and what the source raises; the folder is then of no use.
    """
    rows = _Writing(disk, folder / ROWS)
    try:
        chunks = _write_rows(rows, still, source)
    finally:
        files = {ROWS: rows.close()}
    replies = _Writing(disk, folder / REPLIES)
    try:
        entries, reply_chunks = _write_replies(replies, state, still, source)
    finally:
        files[REPLIES] = replies.close()
    manifest = {
        "format": FORMAT,
        "identity": state.identity,
        "number": state.number,
        "num_layers": still.format.num_layers,
        "arrays": [[array.name, str(array.dtype), list(array.shape)] for array in still.format.arrays],
        "appended_rows": state.appended_rows,
        "evicted_rows": state.evicted_rows,
        "sequences": entries,
        "pinned": [name for name, sequence in state.sequences.items() if sequence.is_pinned],
        "chunks": chunks,
        "reply_chunks": reply_chunks,
        "files": files,
    }
    disk.replace(folder / MANIFEST, _sealed(manifest))


def _write_rows(file: _Writing, still: Still, source: Source) -> list[list[object]]:
    """Writes all rows, at last those of sequences that have to be salvaged, as one reading of the log serves all."""
    chunks: list[list[object]] = []
    damaged: dict[str, list[Piece]] = {}
    for piece in still.pieces:
        name = still.name_of(piece)
        if name in damaged:
            damaged[name].append(piece)
            continue
        try:
            parts = source.take(piece)
        except (Corrupt, NotReady):
            if not still.is_filed(piece):
                raise
            damaged[name] = [piece]
        else:
            chunks.append([name, piece.position, piece.length, file.chunk(parts)])
    if damaged:
        _salvage(still, list(damaged), source)
    for name, pieces in damaged.items():
        chunks += [[name, piece.position, piece.length, file.chunk(source.take(piece))] for piece in pieces]
    return chunks


def _salvage(still: Still, names: list[str], source: Source) -> None:
    rescue = source.salvage(names)
    for name in names:
        still.rescue(name, rescue)


def _whole(still: Still, name: str, sequence: Sequence, source: Source) -> Sequence:
    """A sequence with its writers."""
    try:
        return still.whole(name, sequence)
    except (Corrupt, NotReady):  # without rows, or its file has become bad since they were read
        _salvage(still, [name], source)
        return still.whole(name, sequence)


def _write_replies(file: _Writing, state: State, still: Still, source: Source) -> tuple[list[list[object]], list[int]]:
    """Writes what the writers were answered; the entries of all sequences, and the CRC-32 of each chunk."""
    entries, crcs, waiting = [], [], bytearray()
    for name, sequence in state.sequences.items():
        whole = _whole(still, name, sequence, source)
        entries.append(_sequence_entry(name, whole))
        waiting += encode_replies(whole)
        while len(waiting) >= REPLY_CHUNK_BYTES:
            crcs.append(file.chunk([memoryview(bytes(waiting[:REPLY_CHUNK_BYTES]))]))
            del waiting[:REPLY_CHUNK_BYTES]
    if waiting:
        crcs.append(file.chunk([memoryview(waiting)]))
    return entries, crcs


def _sealed(manifest: Mapping[str, object]) -> bytes:
    text = json.dumps(manifest, separators=(",", ":"), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256":"{digest}","manifest":{text}}}\n'.encode()


def _sequence_entry(name: str, sequence: Sequence) -> list[object]:
    counters = [sequence.place, sequence.epoch, sequence.next_position, sequence.floor]
    return [name, *counters, writers_entry(sequence)]


def newest(folder: MemoryFolder, before: int | None = None) -> tuple[Snapshot | None, int]:
    """The newest snapshot, and the first segment of the log behind it; None, and 1, where the log has everything.

    before: of those with a lower number. One that was never read back, so that what it replaces is still there, is read
    now, and gives way to that where it is damaged, and says so. Raises Corrupt where nothing else is there, OSError.
    """
    numbers = [number for number in folder.snapshots() if before is None or number < before]
    has_log = FIRST_SEGMENT in folder.segments()
    for number in reversed(numbers):
        is_last = number == numbers[0] and not has_log
        try:
            snapshot = Snapshot(folder.disk, folder.snapshot(number))
            if not is_last:
                snapshot.verify()
        except Corrupt as error:
            if is_last:
                raise
            trouble(_log, "snapshot is damaged, taking what was before it", error, folder=str(folder.path))
        else:
            return snapshot, number
    return None, FIRST_SEGMENT


class Snapshot:
    """A snapshot on a disk. Every call raises Corrupt where something does not fit, and OSError."""

    def __init__(self, disk: Disk, folder: Path) -> None:
        """Reads and checks the manifest."""
        self._disk = disk
        self._folder = folder
        self._manifest = _unsealed(disk.read(folder / MANIFEST), folder)
        try:
            files = [(name, self._part("files")[name]) for name in (ROWS, REPLIES)]
            self._files = {name: (a_count(each["bytes"]), a_count(each["crc32"])) for name, each in files}
            self.chunks = [_chunk(each) for each in self._part("chunks")]
            self.identity, self.number = str(self._part("identity")), a_count(self._part("number"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Corrupt(f"{folder}: its manifest lacks something: {error}") from error

    @property
    def num_bytes(self) -> int:
        """Bytes of rows."""
        return self._files[ROWS][0]

    def state(self, spec: MemorySpec) -> State:
        """What it holds beside rows, for a memory of this spec."""
        arrays = [[array.name, str(array.dtype), list(array.shape)] for array in RowFormat(spec).arrays]
        if self._part("arrays") != arrays or self._part("num_layers") != spec.num_layers:
            raise Corrupt(f"{self._folder}: its arrays are not those of the memory")
        try:
            replies = iter(self._replies())
            sequences = {a_name(entry[0]): _sequence(entry, replies) for entry in self._part("sequences")}
            for name in self._manifest.get("pinned", ()):  # manifests of before there were pins have none
                sequences[name].is_pinned = True
            return State(
                identity=self.identity,
                number=self.number,
                appended_rows=a_count(self._part("appended_rows")),
                evicted_rows=a_count(self._part("evicted_rows")),
                sequences=sequences,
            )
        except (StopIteration, RuntimeError, TypeError, ValueError, LookupError) as error:
            raise Corrupt(f"{self._folder}: its manifest does not fit its replies") from error

    def rows(self, row_bytes: int) -> Iterator[tuple[Chunk, memoryview]]:
        """Every chunk of rows with its bytes, which are valid until the next one."""
        lengths = [chunk.num_rows * row_bytes for chunk in self.chunks]
        crcs = [chunk.crc for chunk in self.chunks]
        yield from zip(self.chunks, self._checked(ROWS, lengths, crcs), strict=True)

    def verify(self) -> None:
        """Reads everything, and checks it."""
        total = sum(chunk.num_rows for chunk in self.chunks)
        row_bytes = self.num_bytes // total if total else 0
        for _ in self.rows(row_bytes):
            """What is checked is not kept."""
        self._replies()

    def _part(self, name: str) -> Any:
        try:
            return self._manifest[name]
        except KeyError as error:
            raise Corrupt(f"{self._folder}: its manifest has no {name}") from error

    def _replies(self) -> list[list[int]]:
        size, _ = self._files[REPLIES]
        lengths = [min(REPLY_CHUNK_BYTES, size - at) for at in range(0, size, REPLY_CHUNK_BYTES)]
        table: list[list[int]] = []
        for content in self._checked(REPLIES, lengths, self._part("reply_chunks")):
            table += np.frombuffer(content, np.uint64).reshape(-1, NUMBERS).tolist()
        return table

    def _checked(self, name: str, lengths: list[int], crcs: list[int]) -> Iterator[memoryview]:
        """The chunks of a file, one behind the other, each checked, and at last the file as a whole."""
        size, whole = self._files[name]
        file = self._disk.open(self._folder / name)
        try:
            if file.size != size or sum(lengths) != size or len(lengths) != len(crcs):
                raise Corrupt(f"{self._folder / name}: {file.size} bytes, {size} expected")
            buffer = memoryview(bytearray(max(lengths, default=0)))  # no more than the file has
            offset, crc = 0, 0
            for length, expected in zip(lengths, crcs, strict=True):
                view = buffer[:length]
                if file.read_into(offset, view) < length or zlib.crc32(view) != expected:
                    raise Corrupt(f"{self._folder / name}: the chunk at byte {offset} fails its check")
                crc = zlib.crc32(view, crc)
                offset += length
                yield view
            if crc != whole:
                raise Corrupt(f"{self._folder / name}: the file fails its check")
        finally:
            file.close()


def _unsealed(content: bytes | None, folder: Path) -> dict[str, Any]:
    """The manifest. Raises Corrupt unless it is byte for byte what `_sealed` makes of it."""
    if content is None:
        raise Corrupt(f"{folder}: it has no manifest")
    try:
        manifest = json.loads(content)["manifest"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"{folder}: its manifest cannot be read") from error
    if not isinstance(manifest, dict) or _sealed(manifest) != content:
        raise Corrupt(f"{folder}: its manifest fails its check")
    if manifest.get("format") != FORMAT:
        raise Corrupt(f"{folder}: a snapshot of format {manifest.get('format')}, and this release reads {FORMAT}")
    return manifest


def _chunk(entry: Iterable[Any]) -> Chunk:
    sequence, *numbers = entry
    return Chunk(a_name(sequence), *map(a_count, numbers))


def _sequence(entry: list[Any], replies: Iterator[list[int]]) -> Sequence:
    _, *numbers, writers = entry
    place, epoch, next_position, floor = map(a_count, numbers)
    return Sequence(place, epoch, next_position, floor, found_writers(writers, replies))
