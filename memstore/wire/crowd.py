"""Of how many parts a message is, told from its bytes before it is parsed.

Parsed, a part of two bytes is a value of eighty: a message of 64 MiB could take 3 GiB, and seconds of the thread that
parses. A part is a field, or 64 bytes of the elements of a packed one. Messages in which nothing can stand often are
one each, and so are the bytes of a tensor, however many: parsed, they take no more than before.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from google.protobuf.descriptor import FieldDescriptor

from memstore.wire.limits import MAX_MESSAGE_PARTS

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor

_SMALL_BYTES = 2 * MAX_MESSAGE_PARTS
"""A message of no more bytes has not too many: a part has two of them at least."""
_PACKED_BYTES = 64
"""Packed elements that are one part: parsed, they take eight times as much at most."""
_VARINT, _EIGHT, _COUNTED, _FOUR = 0, 1, 2, 5


def is_crowd(kind: Descriptor, content: bytes) -> bool:
    """True for a message of this kind that has more than MAX_MESSAGE_PARTS, or whose bytes are none.

    Small ones are not looked at: that they are none is found by parsing them.
    """
    if len(content) <= _SMALL_BYTES:
        return False
    try:
        return _left(kind, content, (0, len(content)), MAX_MESSAGE_PARTS) < 0
    except IndexError:  # it ends within a field, or a number does not end
        return True


def _left(kind: Descriptor, content: bytes, extent: tuple[int, int], left: int) -> int:
    """What is left of so many parts without those of a message; below 0 where that is too few, or it is none.

    IndexError where it ends within a field.
    """
    inner = _inner(kind)
    at, end = extent
    while at < end and left >= 0:
        left -= 1
        key = content[at]
        at += 1
        if key > 127:
            key, at = _number(content, at - 1)
        wire_type = key & 7
        if wire_type == _COUNTED:
            length = content[at]
            at += 1
            if length > 127:
                length, at = _number(content, at - 1)
            if at + length > end:
                return -1
            number = key >> 3
            if number in inner:
                below = inner[number]
                left = (
                    left - length // _PACKED_BYTES if below is None else _left(below, content, (at, at + length), left)
                )
            at += length
        elif wire_type == _VARINT:
            _, at = _number(content, at)
        elif wire_type in (_EIGHT, _FOUR):
            at += 8 if wire_type == _EIGHT else 4
        else:  # a group, which no message of the contract has
            return -1
    return left if at <= end else -1


def _number(content: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and where it ends. IndexError where it does not, as one of 64 bits must."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise IndexError


@cache
def _inner(kind: Descriptor) -> dict[int, Descriptor | None]:
    """The fields in which something can stand often, by number: messages of these kinds, and None for packed ones."""
    texts = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
    return {
        field.number: field.message_type
        for field in kind.fields
        if (_can_be_crowded(field.message_type) if field.message_type is not None else field.is_repeated)
        and field.type not in texts
    }


def _can_be_crowded(kind: Descriptor) -> bool:
    return any(field.is_repeated for field in kind.fields) or bool(_inner(kind))
