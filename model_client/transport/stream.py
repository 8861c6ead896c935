"""StepStream: one kept-open stream of steps, answered by number."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from memstore.v1 import memstore_pb2 as pb
from model_client.errors import ClientClosed, Late, MemstoreClientError, NotAllowed, NotAuthenticated, Unavailable
from model_client.transport import status
from model_client.transport.pieces import MAX_PIECE_BYTES, Answer, Assembly

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from model_client.transport.pieces import PiecesPlane

METHOD = "/memstore.v1.MemoryService/StepStream"
_log = logging.getLogger(__name__)
_numbers = itertools.count(1)
"""Of the steps of all streams, so that no two that are under way have the same."""

GRACE_S = 1.0
"""How long after its deadline an unanswered step is still waited for."""

_STEP_TAG = b"\x7a"  # field 15, length-delimited


class StepStream:
    """Steps sent in order, several under way at once. Its reader thread ends with the stream."""

    def __init__(
        self,
        channel: grpc.Channel,
        metadata: tuple[tuple[str, str], ...],
        plane: PiecesPlane,
        on_received: Callable[[int], None],
    ) -> None:
        self.is_supported = True
        self._plane = plane
        self._on_received = on_received
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[Future[Message], float]] = {}
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._is_closed = False
        self._ended: MemstoreClientError | None = None
        begin: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            METHOD, request_serializer=None, response_deserializer=None
        )
        self._call = begin(iter(self._requests.get, None), metadata=metadata)
        self._reader = threading.Thread(target=self._read, name="memstore-step-stream", daemon=True)
        self._reader.start()

    @property
    def is_broken(self) -> bool:
        """True once no step can be sent any more."""
        return self._ended is not None

    def send(self, step: bytes, timeout_s: float) -> Future[Message] | None:
        """Sends one StepRequest in wire form; None where the stream is broken, and then nothing was sent."""
        number = next(_numbers)
        future: Future[Message] = Future()
        now = time.monotonic()
        with self._lock:
            if self._ended is not None:
                return None
            late = [each for each, (_, until) in self._waiting.items() if until < now]
            overdue = [self._waiting.pop(each)[0] for each in late]
            self._waiting[number] = (future, now + timeout_s + GRACE_S)
            self._requests.put(_framed(number, timeout_s, step))
        for each in overdue:
            each.set_exception(Late("no answer before the deadline"))
        return future

    def close(self) -> None:
        """Ends the stream and its threads; steps under way fail with ClientClosed."""
        self._is_closed = True
        self._requests.put(None)
        self._call.cancel()
        self._reader.join()

    def _read(self) -> None:
        assembly = Assembly()
        try:
            for content in self._call:
                self._on_received(len(content))
                answer = assembly.add(content)
                if answer is not None:
                    self._answer(answer)
            self._end(Unavailable("the server ended the stream"))
        except grpc.RpcError:
            self._end(self._error())
        except DecodeError as error:
            self._call.cancel()
            self._end(Unavailable(f"the server's messages are none of a stream of steps: {error}"))
        except Exception as error:  # the root of the thread: no memory for an answer, or a bug, leaves nobody waiting
            _log.exception("answers could not be read")
            self._call.cancel()
            self._end(Unavailable(f"answers could not be read: {error!r}"))

    def _answer(self, answer: Answer) -> None:
        response = answer.message
        with self._lock:
            future, _ = self._waiting.pop(response.call_id, (None, 0.0))
        if future is None:  # it was late, and nobody waits for it any more
            return
        if response.WhichOneof("outcome") == "failure":
            future.set_exception(status.from_stream(response.failure))
        else:
            self._plane.keep(answer)
            future.set_result(response.step)

    def _error(self) -> MemstoreClientError:
        """Why the stream broke. That says nothing about the single steps unless the stream was refused altogether."""
        if self._is_closed:
            return ClientClosed("the client is closed")
        self.is_supported = self._call.code() is not grpc.StatusCode.UNIMPLEMENTED
        error = status.from_call(self._call)
        if isinstance(error, NotAuthenticated | NotAllowed):
            return error
        return Unavailable(f"the stream broke: {error.message}")

    def _end(self, error: MemstoreClientError) -> None:
        with self._lock:
            self._ended = error
            waiting = [future for future, _ in self._waiting.values()]
            self._waiting.clear()
        self._requests.put(None)
        for future in waiting:
            future.set_exception(error)


def _framed(number: int, timeout_s: float, step: bytes) -> bytes:
    """A StepStreamRequest in wire form, without another copy of the step as a message."""
    head = pb.StepStreamRequest(call_id=number, max_piece_bytes=MAX_PIECE_BYTES)
    head.timeout.seconds, head.timeout.nanos = divmod(int(timeout_s * 1e9), 1_000_000_000)
    return b"".join((head.SerializeToString(), _STEP_TAG, _varint(len(step)), step))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
