"""The messages of a step stream in wire form, without another copy of what is large in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.v1 import memstore_pb2 as pb
from memstore.wire import fields, limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from google.protobuf.message import Message

    from memstore.replies import ReplyPlane

_PIECE_TAG = b"\x72"  # field 14, length-delimited
_STEP_TAG = b"\x7a"  # field 15, length-delimited


def piece_bytes(max_piece_bytes: int) -> int:
    """How long the pieces of an answer are at most; 0 where the caller takes none. Raises InvalidRequest."""
    if max_piece_bytes == 0:
        return 0
    asked = fields.whole(max_piece_bytes, "max_piece_bytes", limits.MIN_PIECE_BYTES, 2**31 - 1)
    return min(asked, limits.MAX_PIECE_BYTES)


def failure_frame(call_id: int, failure: pb.Failure) -> bytes:
    """The answer to a step that was not done."""
    return pb.StepStreamResponse(call_id=call_id, failure=failure).SerializeToString()


def answer_frames(call_id: int, reply: Message, plane: ReplyPlane, most: int) -> Iterator[bytes]:
    """The messages of the answer to a step, with pieces of at most `most` bytes; each is made when it is asked for."""
    pieces = plane.pieces(most)
    head = pb.StepStreamResponse(call_id=call_id, pieces_bytes=plane.pieces_bytes).SerializeToString()
    step = reply.SerializeToString()
    yield b"".join((head, *_piece(next(pieces, ())), _STEP_TAG, _varint(len(step)), step))
    head = pb.StepStreamResponse(call_id=call_id).SerializeToString()
    for piece in pieces:
        yield b"".join((head, *_piece(piece)))


def _piece(parts: Sequence[memoryview]) -> tuple[bytes | memoryview, ...]:
    """The field, as the parts that it is to be joined of; none where it is empty."""
    return (_PIECE_TAG, _varint(sum(map(len, parts))), *parts) if parts else ()


def _varint(value: int) -> bytes:
    low = []
    while value > 0x7F:
        low.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*low, value))
