"""GrpcTransport: calls over one gRPC channel, steps over a kept-open stream."""

from __future__ import annotations

import ipaddress
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from google.protobuf import message_factory

from memstore.v1 import memstore_pb2 as pb
from model_client.errors import ClientClosed, InvalidRequest, MemstoreClientError
from model_client.transport import status
from model_client.transport.pieces import PiecesPlane
from model_client.transport.stream import StepStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from model_client.stats import ClientStats
    from model_client.transport import TransportOptions

MAX_MESSAGE_BYTES = 64 << 20
REOPEN_S = 1.0
"""How long after a stream broke steps are unary calls, before another stream is tried."""

_METHODS = {
    method.name: (
        f"/{method.containing_service.full_name}/{method.name}",
        message_factory.GetMessageClass(method.output_type),
    )
    for method in pb.DESCRIPTOR.services_by_name["MemoryService"].methods
    if not method.server_streaming
}
"""Name of a unary call -> its path, and the class of its replies."""


CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A server that comes back is found again within a second, not within the library's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_retries", 0),  # what is tried again is decided in core.py
    ("grpc.use_local_subchannel_pool", 1),  # a new channel after a fork must not find the old connection
)
"""Of every channel."""
_ABANDONED: list[grpc.Channel] = []
"""Channels of the process that this one was forked from: closing them here would wait for threads that are not here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcOptions:
    """Where to connect to, and as whom. tls_*: PEM. token: gives the one of now."""

    target: str
    tls_root: bytes | None
    tls_cert: bytes | None
    tls_key: bytes | None = field(repr=False)
    token: Callable[[], str] | None = field(repr=False)
    use_stream: bool

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What is sent with a call that begins now."""
        return () if self.token is None else (("authorization", f"Bearer {self.token()}"),)

    @staticmethod
    def of(target: str, options: TransportOptions) -> GrpcOptions:
        """Checks and reads the options. ValueError where a token would travel in the clear."""
        token, root = options.get("token"), _pem(options.get("tls_root"))
        if token and root is None and not options.get("allow_insecure_token") and not is_local(target):
            raise ValueError(
                f"a token for {target} would travel in the clear: give tls_root, or allow_insecure_token=True"
            )
        return GrpcOptions(
            target=target,
            tls_root=root,
            tls_cert=_pem(options.get("tls_cert")),
            tls_key=_pem(options.get("tls_key")),
            token=(lambda: token) if isinstance(token, str) and token else token or None,
            use_stream=options.get("use_stream", True),
        )


def _pem(content: bytes | str | None) -> bytes | None:
    return Path(content).read_bytes() if isinstance(content, str) else content


def is_local(target: str) -> bool:
    """True where what is sent to `target` cannot leave this host: a Unix socket or a loopback address."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = target.removeprefix("dns:///").rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Connection:
    """A channel and its stream, both of one process."""

    def __init__(self, options: GrpcOptions, plane: PiecesPlane, stats: ClientStats) -> None:
        self.process_id = os.getpid()
        self._plane = plane
        self.channel = _open_channel(options)
        self._options = options
        self._stats = stats
        self._lock = threading.Lock()
        self._stream: StepStream | None = None
        self._may_stream = options.use_stream
        self._reopen_at = 0.0
        self._is_closed = False
        self._unary: dict[str, grpc.UnaryUnaryMultiCallable[bytes, bytes]] = {
            name: self.channel.unary_unary(path, request_serializer=None, response_deserializer=None)
            for name, (path, _) in _METHODS.items()
        }

    def call(self, method: str, request: Message, timeout_s: float) -> Future[Message]:
        """See Transport.call."""
        content = request.SerializeToString()
        if len(content) > MAX_MESSAGE_BYTES:
            return _failed(
                InvalidRequest(f"the call has {len(content)} bytes, {MAX_MESSAGE_BYTES} are allowed: send fewer rows")
            )
        self._stats.add("sent_bytes", len(content))
        stream = self._usable_stream() if method == "Step" else None
        answer = stream.send(content, timeout_s) if stream is not None else None
        return answer if answer is not None else self._call_unary(method, content, timeout_s)

    def close(self) -> None:
        """Ends stream and channel."""
        with self._lock:
            self._is_closed, self._may_stream = True, False
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        self.channel.close()

    def _call_unary(self, method: str, content: bytes, timeout_s: float) -> Future[Message]:
        answer: Future[Message] = Future()
        kind = _METHODS[method][1]

        def tell(_: object) -> None:
            if call.exception() is not None:
                answer.set_exception(_closed() if self._is_closed else status.from_call(call))
                return
            reply = call.result()
            self._stats.add("received_bytes", len(reply))
            answer.set_result(kind.FromString(reply))

        try:
            call = self._unary[method].future(content, timeout=timeout_s, metadata=self._options.metadata)
        except ValueError:  # the channel was closed by another thread
            return _failed(_closed())
        call.add_done_callback(tell)
        return answer

    def _usable_stream(self) -> StepStream | None:
        """The stream that stands, or a new one unless one broke just now."""
        stream = self._stream
        if stream is not None and not stream.is_broken:
            return stream
        with self._lock:
            if self._stream is not None and self._stream.is_broken:
                self._may_stream &= self._stream.is_supported
                self._reopen_at = time.monotonic() + REOPEN_S
                self._stream = None
            if self._stream is None and self._may_stream and time.monotonic() >= self._reopen_at:
                self._stream = StepStream(self.channel, self._options.metadata, self._plane, self._count_received)
            return self._stream

    def _count_received(self, num_bytes: int) -> None:
        self._stats.add("received_bytes", num_bytes)


class GrpcTransport:
    """One channel, made at the first call and made anew after a fork; steps ride on one stream where possible.

    When the stream breaks, steps are unary calls until a new stream stands.
    """

    def __init__(self, options: GrpcOptions, stats: ClientStats) -> None:
        self.name = "grpc-stream" if options.use_stream else "grpc"
        self.plane = PiecesPlane()
        self._options = options
        self._stats = stats
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._is_closed = False

    def call(self, method: str, request: Message, timeout_s: float) -> Future[Message]:
        """Begins the call: a Step on the stream where one stands, all else as a unary call."""
        try:
            connection = self._connect()
        except MemstoreClientError as error:
            return _failed(error)
        return connection.call(method, request, timeout_s)

    def close(self) -> None:
        """Closes stream and channel; calls under way fail with ClientClosed."""
        with self._lock:
            self._is_closed = True
            connection, self._connection = self._connection, None
        if connection is not None and connection.process_id == os.getpid():
            connection.close()

    def _connect(self) -> Connection:
        connection = self._connection
        if connection is not None and connection.process_id == os.getpid():
            return connection
        with self._lock:
            if self._is_closed:
                raise _closed()
            if self._connection is None or self._connection.process_id != os.getpid():
                if self._connection is not None:
                    _ABANDONED.append(self._connection.channel)
                self._connection = Connection(self._options, self.plane, self._stats)
            return self._connection


def _open_channel(options: GrpcOptions) -> grpc.Channel:
    if options.tls_root is None:
        return grpc.insecure_channel(options.target, options=CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(options.tls_root, options.tls_key, options.tls_cert)
    return grpc.secure_channel(options.target, credentials, options=CHANNEL_OPTIONS)


def _closed() -> ClientClosed:
    return ClientClosed("the client is closed")


def _failed(error: MemstoreClientError) -> Future[Message]:
    answer: Future[Message] = Future()
    answer.set_exception(error)
    return answer
