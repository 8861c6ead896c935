"""Replies: what answers over gRPC hold until their callers have taken them, and how their tensors leave in pieces."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from memstore.errors import Overloaded
from memstore.plane import DATA_TYPES, InlinePlane, bytes_of, on_host
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from google.protobuf.message import Message

READER_RATIO = 0.25
"""Share of the budget that one reader may hold, or one reply of any size. Beyond half of it no more is begun for it."""

RETRY_DELAY_S = 0.05
ALIGNMENT = 16
"""Slices of the pieces begin at multiples of this, so that any element may be read where it lies."""


class ReplyBudget:
    """Bytes of replies that are made and not yet taken, over all callers. Thread safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self.lock = threading.Lock()


class Reader:
    """Who takes replies: one stream, or the caller of one call. Thread safe."""

    def __init__(self, budget: ReplyBudget) -> None:
        self._budget = budget
        self._most = int(budget.max_bytes * READER_RATIO)
        self._held_bytes = 0

    @property
    def is_behind(self) -> bool:
        """True while it had better take something before more is made for it."""
        return self._held_bytes > self._most / 2

    def reserve(self, num_bytes: int) -> None:
        """Takes a reply into the budget. Overloaded where it has no room; a lone reply is never refused."""
        budget = self._budget
        with budget.lock:
            is_own_full = self._held_bytes > 0 and self._held_bytes + num_bytes > self._most
            is_full = budget.held_bytes > 0 and budget.held_bytes + num_bytes > budget.max_bytes
            if is_own_full or is_full:
                why = "there is no room for it now"
                if is_own_full:
                    why = f"this caller has not yet taken {self._held_bytes:,} of those before"
                raise Overloaded(f"the reply has {num_bytes:,} bytes, and {why}; nothing was changed", RETRY_DELAY_S)
            self._held_bytes += num_bytes
            budget.held_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Gives the room back."""
        with self._budget.lock:
            self._held_bytes -= num_bytes
            self._budget.held_bytes -= num_bytes


class ReplyPlane(InlinePlane):
    """The inline plane of one call: its reply is counted from its making until `release`.

    With a call_id the tensors stay beside the message, which has slices of the pieces that they will leave in.
    """

    def __init__(self, reader: Reader, max_reply_bytes: int, call_id: int | None = None) -> None:
        super().__init__(max_reply_bytes)
        self.pieces_bytes = 0
        self._reader = reader
        self._call_id = call_id
        self._views: list[memoryview] = []
        self._held_bytes = 0
        self._is_released = False
        self._lock = threading.Lock()

    def fill(self, targets: Sequence[pb.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        """See Plane.fill. Overloaded where too much waits to be taken."""
        self._hold(sum([tensor.nbytes for tensor in tensors]))
        if self._call_id is None:
            super().fill(targets, tensors)
            return
        for target, tensor in zip(targets, on_host(tensors), strict=True):
            self._lay_out(target, tensor, self._call_id)

    def discard(self, message: Message) -> None:
        """The reply is not sent."""
        self.release()

    def release(self) -> None:
        """The reply is taken, or nobody will take it. What is made of it later is not counted. May be called again."""
        with self._lock:
            self._reader.release(self._held_bytes)
            self._held_bytes = 0
            self._is_released = True
            self._views = []

    def pieces(self, most: int) -> Iterator[list[memoryview]]:
        """The bytes of all tensors, in pieces of `most`: each as the parts that it is to be joined of."""
        piece, room = [], most
        for view in self._views:
            begin = 0
            while begin < len(view):
                part = view[begin : begin + room]
                begin, room = begin + len(part), room - len(part)
                piece.append(part)
                if not room:
                    yield piece
                    piece, room = [], most
        if piece:
            yield piece

    def _hold(self, num_bytes: int) -> None:
        with self._lock:
            if not self._is_released:
                self._reader.reserve(num_bytes)
                self._held_bytes += num_bytes

    def _lay_out(self, target: pb.Tensor, tensor: torch.Tensor, call_id: int) -> None:
        gap = -self.pieces_bytes % ALIGNMENT
        view = bytes_of(tensor)
        self._views += [memoryview(bytes(gap)), view] if gap else [view]
        target.dtype = DATA_TYPES[tensor.dtype]
        target.shape.extend(tensor.shape)
        region = target.region
        region.plane = pb.PLANE_INLINE
        region.region = call_id
        region.offset_bytes = self.pieces_bytes + gap
        region.length_bytes = len(view)
        self.pieces_bytes += gap + len(view)
