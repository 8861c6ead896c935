"""Pieces: the answers of a stream whose tensors come in several messages, put together."""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from google.protobuf.message import DecodeError

from memstore.v1 import memstore_pb2 as pb
from model_client.errors import Internal
from model_client.wire import InlinePlane, element_format, tensor_of

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from numpy.typing import NDArray

MAX_PIECE_BYTES = 3 << 17
"""What is asked for. Longer messages are mapped and unmapped by the C library one by one, and each page costs a fault;
shorter ones cost more for themselves than for what is in them."""

MAX_ANSWER_BYTES = 1 << 26
HUGE_BYTES = 1 << 21
"""A page of the large kind; from twice this on a buffer is made of such."""

_PIECE_TAG = 14 << 3 | 2
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer. buffer: its pieces, one behind the other; None where it has none."""

    message: pb.StepStreamResponse
    buffer: NDArray[np.uint8] | None


class Assembly:
    """Puts the answers of one stream together. DecodeError where its messages are none."""

    def __init__(self) -> None:
        self._message: pb.StepStreamResponse | None = None
        self._buffer: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._length = 0

    def add(self, content: bytes) -> Answer | None:
        """Takes the next message of the stream; the answer, if that completes one."""
        piece, rest = _without_piece(content)
        message = pb.StepStreamResponse.FromString(rest)
        if self._message is None:
            if not message.pieces_bytes:
                return Answer(message, None)
            if not 0 < message.pieces_bytes <= MAX_ANSWER_BYTES:
                raise DecodeError(f"an answer of {message.pieces_bytes} bytes")
            self._message, self._buffer, self._length = message, _buffer(message.pieces_bytes), 0
        end = self._length + len(piece)
        if message.call_id != self._message.call_id or end > len(self._buffer) or not len(piece):
            raise DecodeError("a piece of another answer")
        np.copyto(self._buffer[self._length : end], np.frombuffer(piece, np.uint8))  # frees the interpreter's lock
        self._length = end
        if end < len(self._buffer):
            return None
        answer = Answer(self._message, self._buffer)
        self._message, self._buffer = None, np.empty(0, np.uint8)
        return answer


class PiecesPlane(InlinePlane):
    """Tensors as bytes inside the message, or beside it in the pieces that came with it.

    Those of one answer that came in pieces lie in one buffer, which lives as long as one of them. It crosses to another
    device as a whole.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}

    def keep(self, answer: Answer) -> None:
        """Keeps the pieces of an answer until its tensors are read or discarded."""
        if answer.buffer is not None:
            hits = answer.message.step.hits
            num_tensors = 3 + hits.HasField("scores") + hits.HasField("left_out") + len(hits.arrays)
            self._kept[answer.message.call_id] = _Kept(answer.buffer, num_tensors)

    def read(self, message: pb.Tensor, device: torch.device) -> torch.Tensor:
        """See TensorPlane.read."""
        if not message.HasField("region"):
            return super().read(message, device)
        region = message.region
        number = region.region
        kept = self._kept.get(number)
        if kept is None or region.plane != pb.PLANE_INLINE:
            raise Internal(f"the reply has a tensor in region {number}, which is not here")
        kept.num_unread -= 1
        if kept.num_unread == 0:
            del self._kept[number]
        if device.type == "cpu":
            return tensor_of(message, kept.buffer, region.offset_bytes, region.length_bytes, device)
        return _slice(message, kept.on(device))

    def discard(self, message: Message) -> None:
        """Lets go of the pieces of an answer."""
        if isinstance(message, pb.StepResponse) and message.hits.index.region.plane == pb.PLANE_INLINE:
            self._kept.pop(message.hits.index.region.region, None)


@dataclass(slots=True)
class _Kept:
    buffer: NDArray[np.uint8]
    num_unread: int
    crossed: torch.Tensor | None = None

    def on(self, device: torch.device) -> torch.Tensor:
        """The buffer on another device, (bytes,) uint8."""
        if self.crossed is None or self.crossed.device != device:
            self.crossed = torch.from_numpy(self.buffer).to(device)  # waits: the buffer may be let go of then
        return self.crossed


def _slice(message: pb.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The tensor whose elements are a slice of a buffer. Raises Internal."""
    begin, num_bytes = message.region.offset_bytes, message.region.length_bytes
    dtype, shape = element_format(message, begin, num_bytes)
    if begin + num_bytes > len(buffer) or begin % dtype.itemsize:
        raise Internal(f"the reply has a tensor beyond its bytes, or between its elements: {num_bytes} at {begin}")
    return buffer[begin : begin + num_bytes].view(dtype).view(shape)


def _buffer(num_bytes: int) -> NDArray[np.uint8]:
    """Room for an answer, which a GPU that this process uses can read by itself.

    Without one, a large answer is on huge pages, if the system has some, as each page costs a fault.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with suppress(RuntimeError):  # no such memory is left
            pinned: NDArray[np.uint8] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
            return pinned
    if num_bytes < 2 * HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(num_bytes, np.uint8)
    size = num_bytes // HUGE_BYTES * HUGE_BYTES + 2 * HUGE_BYTES
    mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    begin = -whole.ctypes.data % HUGE_BYTES
    return whole[begin : begin + num_bytes]


def _without_piece(content: bytes) -> tuple[memoryview, bytes]:
    """The piece in a StepStreamResponse in wire form, and the message without it."""
    at, end = 0, len(content)
    while at < end:
        begin = at
        tag, at = _varint(content, at)
        kind = tag & 7
        if kind == _DELIMITED:
            length, at = _varint(content, at)
            at += length
            if tag == _PIECE_TAG and at <= end:
                return memoryview(content)[at - length : at], content[:begin] + content[at:]
        elif kind == _VARINT:
            _, at = _varint(content, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            break
    return memoryview(b""), content


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The number at a place of a message, and the place behind it. DecodeError where it does not end."""
    value = 0
    for place, byte in enumerate(content[at : at + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise DecodeError("a number without an end")
