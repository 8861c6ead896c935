"""Calling a server in a test: errors as they were raised, streams as conversations."""

from __future__ import annotations

import hashlib
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc._cython import cygrpc
from grpc_status import rpc_status

from memstore import status
from memstore.auth import Tokens
from memstore.followed import Followed
from memstore.seams import SystemClock
from memstore.tokens import parse_tokens
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from google.protobuf.message import Message

    from memstore.errors import (
        MemstoreError,
    )
    from memstore.seams import Clock
    from tests.serving import Serving


def failure(error: grpc.RpcError) -> MemstoreError:
    """The error that a failed call carries."""
    rich = rpc_status.from_call(error)
    assert rich is not None, error
    found = status.error_of(status.from_status(rich))
    assert found is not None, error
    return found


def fails(server: Serving, method: str, request: Message, **call: object) -> MemstoreError:
    """The error of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        getattr(server.stub, method)(request, **call)
    return failure(caught.value)


def method_of(request: Message) -> str:
    """The method that takes such a request."""
    return request.DESCRIPTOR.name.removesuffix("Request")


@contextmanager
def awaiting_next(stream: Any) -> Iterator[Future[Any]]:
    """What comes next of a stream, which is waited for from the beginning of the block on.

    Who does not wait yet when a stream ends is told of its end, and not of its last message.
    """
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, stream)
        while cygrpc.OperationType.receive_message not in stream._state.due:
            time.sleep(0.001)
        yield following


def until_queued(server: Serving, number: int) -> None:
    """Returns once so many requests wait for the device; the test's own time limit ends it otherwise."""
    while server.registry.worker.admission.num_requests < number:
        server.stub.ServerInfo(pb.ServerInfoRequest())


def until_streams_ended(server: Serving) -> None:
    """Returns once no stream is open; the test's own time limit ends it otherwise."""
    while server.metrics.registry.get_sample_value("memstore_sessions") != 0:
        server.stub.ServerInfo(pb.ServerInfoRequest())


class Conversation:
    """A stream of steps, one at a time or several under way."""

    def __init__(self, server: Serving, **call: object) -> None:
        self._outgoing: queue.Queue[pb.StepStreamRequest | None] = queue.Queue()
        self.answers = server.stub.StepStream(iter(self._outgoing.get, None), **call)  # type: ignore[arg-type]

    def say(
        self, call_id: int, request: pb.StepRequest, timeout_s: float | None = None, max_piece_bytes: int = 0
    ) -> None:
        """Sends one step."""
        message = pb.StepStreamRequest(call_id=call_id, step=request, max_piece_bytes=max_piece_bytes)
        if timeout_s is not None:
            message.timeout.FromMilliseconds(round(timeout_s * 1000))
        self._outgoing.put(message)

    def hear(self) -> pb.StepStreamResponse:
        """The next answer."""
        return next(self.answers)

    def end(self) -> None:
        """Sends no more."""
        self._outgoing.put(None)


def hashed(token: str, tenant: str, *fields: str) -> str:
    """A line of a token file."""
    return " ".join((f"sha256:{hashlib.sha256(token.encode()).hexdigest()}", tenant, *fields))


def tokens(*lines: str, clock: Clock | None = None) -> Tokens:
    """Those of a token file with these lines, which does not change."""
    made = clock or SystemClock()
    return Tokens(Followed((), lambda: parse_tokens("".join(f"{line}\n" for line in lines)), made, 0.0), made)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Metadata with a token."""
    return (("authorization", f"Bearer {token}"),)
