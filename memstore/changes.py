"""Changes: what a call does to the sequences of a memory, as values that a log keeps and that can be done again.

Whatever changes a memory is first made into these, then written to its log, then done; a restart does them once more.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from memstore.errors import Corrupt
from memstore.sequence import Reply

if TYPE_CHECKING:
    from collections.abc import Sequence

_HEAD = struct.Struct("<BBHH")
"""Kind, flags, length of the first name, length of the second one."""
_APPENDED = struct.Struct("<QIq")
_REPLY = struct.Struct("<QqQ")
_FORKED = struct.Struct("<Qqq")
_IS_BEGINNING, _IS_APPEND, _HAS_REPLY, _IS_PINNED = 1, 2, 4, 8


class Appended(NamedTuple):
    """A sequence begins, begins anew, or goes on, and gets rows. A tuple: a step makes one for every sequence.

    new_epoch: of a sequence that begins (anew), else 0. reply: what the writer is answered if it asks again; None where
    the append is not numbered. is_append: false for a reset.
    """

    sequence: str
    new_epoch: int = 0
    is_append: bool = True
    num_rows: int = 0
    first_position: int = 0
    writer: str = ""
    reply: Reply | None = None


class Released(NamedTuple):
    """A sequence ceases to exist."""

    sequence: str


class Forked(NamedTuple):
    """A new sequence gets positions [begin, end) of another one."""

    source: str
    target: str
    epoch: int
    begin: int
    end: int


class Renewed(NamedTuple):
    """A sequence keeps its rows under a new epoch, as some that were appended after them may be lost."""

    sequence: str
    epoch: int


class Pinned(NamedTuple):
    """A sequence is not to be spilled, nor ended for being idle; or it may be again."""

    sequence: str
    is_pinned: bool


Change = Appended | Released | Forked | Renewed | Pinned


def encode(changes: Sequence[Change]) -> bytes:
    """Changes as bytes."""
    return b"".join([_encode(change) for change in changes])


def _encode(change: Change) -> bytes:
    match change:
        case Appended():
            numbers = _APPENDED.pack(change.new_epoch, change.num_rows, change.first_position)
            flags = change.is_append * _IS_APPEND
            if change.reply is None:
                return _framed(1, flags, change.sequence, change.writer) + numbers
            reply = change.reply
            flags |= _HAS_REPLY | (reply.begun_from is not None) * _IS_BEGINNING
            numbers += _REPLY.pack(reply.fingerprint, reply.as_of, reply.begun_from or 0)
            return _framed(1, flags, change.sequence, change.writer) + numbers
        case Released():
            return _framed(2, 0, change.sequence, "")
        case Forked():
            return _framed(3, 0, change.source, change.target) + _FORKED.pack(change.epoch, change.begin, change.end)
        case Renewed():
            return _framed(4, 0, change.sequence, "") + _FORKED.pack(change.epoch, 0, 0)
        case Pinned():
            return _framed(5, change.is_pinned * _IS_PINNED, change.sequence, "")


def _framed(kind: int, flags: int, first: str, second: str) -> bytes:
    one, two = first.encode(), second.encode()
    return _HEAD.pack(kind, flags, len(one), len(two)) + one + two


def decode(content: memoryview) -> list[Change]:
    """The changes that `encode` made bytes of. Raises Corrupt."""
    changes: list[Change] = []
    offset = 0
    try:
        while offset < len(content):
            change, offset = _decode(content, offset)
            changes.append(change)
    except (struct.error, ValueError) as error:
        raise Corrupt(f"a change in the log cannot be read: {error}") from error
    return changes


def _decode(content: memoryview, offset: int) -> tuple[Change, int]:
    """One change and where the next one begins."""
    kind, flags, first_length, second_length = _HEAD.unpack_from(content, offset)
    middle = offset + _HEAD.size + first_length
    end = middle + second_length
    if end > len(content):
        raise ValueError("a name is cut short")
    first, second = str(content[offset + _HEAD.size : middle], "utf-8"), str(content[middle:end], "utf-8")
    match kind:
        case 1:
            epoch, num_rows, first_position = _APPENDED.unpack_from(content, end)
            appended = Appended(first, epoch, bool(flags & _IS_APPEND), num_rows, first_position, second)
            end += _APPENDED.size
            if not flags & _HAS_REPLY:
                return appended, end
            fingerprint, as_of, begun_from = _REPLY.unpack_from(content, end)
            reply = Reply(
                num_rows=num_rows,
                fingerprint=fingerprint,
                as_of=as_of,
                first_position=first_position,
                begun_from=begun_from if flags & _IS_BEGINNING else None,
            )
            return appended._replace(reply=reply), end + _REPLY.size
        case 2:
            return Released(sequence=first), end
        case 3:
            epoch, begin, until = _FORKED.unpack_from(content, end)
            return Forked(source=first, target=second, epoch=epoch, begin=begin, end=until), end + _FORKED.size
        case 4:
            epoch, _, _ = _FORKED.unpack_from(content, end)
            return Renewed(sequence=first, epoch=epoch), end + _FORKED.size
        case 5:
            return Pinned(sequence=first, is_pinned=bool(flags & _IS_PINNED)), end
        case _:
            raise ValueError(f"kind {kind}")
