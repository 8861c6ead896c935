"""Attacks: what a hostile peer does on a raw socket. Each leaves its connections open, and gives them.

HTTP/2 is spoken by hand, as no library would say such things: frames of RFC 9113, headers as literals of RFC 7541.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from io import BufferedIOBase

DATA, HEADERS, RESET, SETTINGS, PING, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM = ACK = 1
END_HEADERS = INITIAL_WINDOW = 4
PATIENCE_S = 1.0
"""How long an attacker waits for a peer that does not take what it sends."""
PIECE = bytes(16_000)
MEGABYTE = 1_000_000
FIRST_ROOM = 65_535
"""Bytes that each end of a connection takes before it has said anything."""


class Target:
    """Where a server listens: host:port, or the path of a Unix socket."""

    def __init__(self, address: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        self.address = address
        self._address = address.removeprefix("unix://").removeprefix("http://")
        self._kind = kind
        self.num_sent = 0

    def connect(self) -> socket.socket:
        """One connection. OSError where the server takes no more."""
        is_path = self._address.startswith("/")
        made = socket.socket(socket.AF_UNIX if is_path else socket.AF_INET, self._kind)
        made.settimeout(PATIENCE_S)
        host, _, port = self._address.rpartition(":")
        try:
            made.connect(self._address if is_path else (host, int(port)))
        except OSError:
            made.close()
            raise
        return made

    def connections(self, number: int) -> Iterator[socket.socket]:
        """So many connections; fewer where the server takes no more, which is not asked again and again."""
        for _ in range(number):
            try:
                connection = self.connect()
            except OSError:
                return
            yield connection

    def send(self, connection: socket.socket, *contents: bytes) -> None:
        """Sends all that the server takes."""
        with suppress(OSError):
            for content in contents:
                connection.sendall(content)
                self.num_sent += len(content)


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """One frame of HTTP/2."""
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def literals(fields: Mapping[str, str]) -> bytes:
    """Headers, none of them abbreviated."""
    texts = ((name.encode(), value.encode()) for name, value in fields.items())
    return b"".join(b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in texts)


def call(method: str, stream: int = 1) -> bytes:
    """The beginning of a call."""
    fields = {":method": "POST", ":scheme": "http", ":path": f"/memstore.v1.MemoryService/{method}", ":authority": "x"}
    return frame(
        HEADERS, END_HEADERS, stream, literals({**fields, "content-type": "application/grpc", "te": "trailers"})
    )


def announced(num_bytes: int) -> bytes:
    """The beginning of a message of so many bytes."""
    return frame(DATA, 0, 1, b"\x00" + struct.pack(">I", num_bytes))


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)
MORE = literals({f"x-{at}": "y" * 100 for at in range(140)})


def silent(target: Target, number: int) -> list[socket.socket]:
    """Connects and says nothing."""
    return list(target.connections(number))


def dripping(target: Target, number: int) -> list[socket.socket]:
    """Begins to say something, a byte at a time."""
    opened = list(target.connections(number))
    for byte in PREFACE[:10]:
        for connection in opened:
            target.send(connection, bytes([byte]))
    return opened


def coming_and_going(target: Target, number: int) -> list[socket.socket]:
    """Connects and leaves at once, some of them with a word."""
    for at, connection in enumerate(target.connections(4 * number)):
        target.send(connection, PREFACE[: at % 40])
        connection.close()
    return []


def garbage(target: Target, number: int) -> list[socket.socket]:
    """Says what is no protocol, and what is another."""
    random = Random(0)
    opened = list(target.connections(number))
    words = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", PREFACE]
    for at, connection in enumerate(opened):
        target.send(connection, [*words, b""][at % 4] + random.randbytes(5000))
    return opened


def half_open(target: Target, number: int) -> list[socket.socket]:
    """Begins a call with a message that it never ends; half of them say that nothing more will come."""
    opened = list(target.connections(number))
    for at, connection in enumerate(opened):
        target.send(connection, PREFACE, call("Step"), announced(60 * MEGABYTE), frame(DATA, 0, 1, PIECE))
        if at % 2:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
    return opened


def idle_calls(target: Target, number: int) -> list[socket.socket]:
    """Opens very many streams on few connections, and says nothing on them."""
    opened = list(target.connections(2))
    for connection in opened:
        target.send(connection, PREFACE, *(call("StepStream", 2 * at + 1) for at in range(20 * number)))
    return opened


def too_large(target: Target, number: int) -> list[socket.socket]:
    """Sends a message beyond the limit."""
    return _pour(target, number // 5, 200 * MEGABYTE, 10 * MEGABYTE)


def without_flow_control(target: Target, number: int) -> list[socket.socket]:
    """Sends far more of a message within the limit than the server said it would take."""
    return _pour(target, number // 5, 60 * MEGABYTE, 16 * MEGABYTE)


def _pour(target: Target, number: int, num_announced: int, num_sent: int) -> list[socket.socket]:
    opened = list(target.connections(number))
    for connection in opened:
        pieces = [frame(DATA, 0, 1, PIECE)] * (num_sent // len(PIECE))
        target.send(connection, PREFACE, call("Step"), announced(num_announced), *pieces)
    return opened


def strangers(target: Target, number: int) -> list[socket.socket]:
    """Sends most of a message within the limit, without a credential, and takes care to send no more than it may."""
    opened = list(target.connections(number // 5))
    for connection in opened:
        target.send(connection, PREFACE, call("Step"), announced(60 * MEGABYTE))
        _send_as_allowed(target, connection, 16 * MEGABYTE)
    return opened


def _send_as_allowed(target: Target, connection: socket.socket, num_bytes: int) -> None:
    """Sends so much of the message of stream 1, as far as the other end gives room for it and does not end the call."""
    room = dict.fromkeys((0, 1), FIRST_ROOM - len(announced(0)))
    with connection.makefile("rb") as reader, suppress(OSError):
        for _ in range(num_bytes // len(PIECE)):
            while min(room.values()) < len(PIECE):
                if not _goes_on(target, connection, reader, room):
                    return
            target.send(connection, frame(DATA, 0, 1, PIECE))
            room = {stream: left - len(PIECE) for stream, left in room.items()}


def _goes_on(target: Target, connection: socket.socket, reader: BufferedIOBase, room: dict[int, int]) -> bool:
    """Reads one frame, and does what it says; False where stream 1, or all, has ended."""
    head = reader.read(9)
    if len(head) < 9:
        return False
    kind, flags, stream = struct.unpack(">xxxBBI", head)
    body = reader.read(int.from_bytes(head[:3]))
    if kind == WINDOW:
        room[stream] += int.from_bytes(body)
    elif kind in (SETTINGS, PING) and not flags & ACK:
        room[1] += _initial_window(body) - FIRST_ROOM if kind == SETTINGS else 0
        target.send(connection, frame(kind, ACK, 0, body if kind == PING else b""))
    return stream != 1 or not (kind == RESET or (kind == HEADERS and flags & END_STREAM))


def _initial_window(settings: bytes) -> int:
    """What is said of it in a frame of settings."""
    return int(dict(struct.iter_unpack(">HI", settings)).get(INITIAL_WINDOW, FIRST_ROOM))


def rapid_reset(target: Target, number: int) -> list[socket.socket]:
    """Begins calls and gives each up at once, so that none counts as open."""
    opened = list(target.connections(2))
    for connection in opened:
        resets = (call("Step", at) + frame(RESET, 0, at, b"\0\0\0\x08") for at in range(1, 400 * number, 2))
        target.send(connection, PREFACE, *resets)
    return opened


def pings(target: Target, number: int) -> list[socket.socket]:
    """Wants to know again and again whether anybody is there."""
    return _repeat(target, [frame(PING, 0, 0, b"12345678")] * (200 * number))


def settings(target: Target, number: int) -> list[socket.socket]:
    """Changes its mind again and again, which the other end has to acknowledge each time."""
    return _repeat(target, [frame(SETTINGS, 0, 0, b"\0\4\0\0\xff\xff")] * (500 * number))


def endless_headers(target: Target, number: int) -> list[socket.socket]:
    """Sends headers that never end."""
    begun = frame(HEADERS, 0, 1, literals({":method": "POST"}))
    return _repeat(target, [begun, *[frame(CONTINUATION, 0, 1, MORE)] * (100 * number)])


def _repeat(target: Target, frames: list[bytes]) -> list[socket.socket]:
    opened = list(target.connections(2))
    for connection in opened:
        target.send(connection, PREFACE, *frames)
    return opened


GRPC = (
    silent,
    dripping,
    coming_and_going,
    garbage,
    half_open,
    idle_calls,
    too_large,
    without_flow_control,
    rapid_reset,
    pings,
    settings,
    endless_headers,
)
"""What is done to a port where gRPC is spoken."""


def endless_request(target: Target, number: int) -> list[socket.socket]:
    """Requests over HTTP/1.1 with a first line, headers and a body that never end."""
    opened = list(target.connections(number))
    beginnings = [
        b"GET /metrics?",
        b"GET /metrics HTTP/1.1\r\nX: ",
        b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
    ]
    for at, connection in enumerate(opened):
        target.send(connection, beginnings[at % 3], *[b"y" * 16_000] * 50)
    return opened


def unread_answers(target: Target, number: int) -> list[socket.socket]:
    """Asks and does not read."""
    opened = list(target.connections(number))
    for connection in opened:
        target.send(connection, b"GET /metrics HTTP/1.1\r\n\r\n" * 100)
    return opened


HTTP = (silent, dripping, coming_and_going, garbage, endless_request, unread_answers)
"""What is done to the port of metrics."""


def guessing(target: Target, number: int) -> list[socket.socket]:
    """Presents tokens that were never given out."""
    random = Random(1)
    opened = list(target.connections(number))
    for at, connection in enumerate(opened):
        claim = pb.ClaimRequest(token=random.randbytes(32 * (at % 3)), remains=pb.MappedMemory(num_sequences=4096))
        target.send(connection, claim.SerializeToString())
    return opened


def handing_over(target: Target, number: int) -> list[socket.socket]:
    """Sends descriptors that nobody has asked for, as many as a packet takes."""
    opened = list(target.connections(number))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(200)]
    for at, connection in enumerate(opened):
        with suppress(OSError):
            socket.send_fds(connection, [bytes(1 + at)], files[: 1 + at * 7 % 200])
            target.num_sent += 1 + at
    for file in files:
        os.close(file)
    return opened


def long_packets(target: Target, number: int) -> list[socket.socket]:
    """Sends packets beyond the limit."""
    opened = list(target.connections(number))
    for connection in opened:
        target.send(connection, *[bytes(100_000)] * 10)
    return opened


PACKETS = (silent, coming_and_going, garbage, guessing, handing_over, long_packets)
"""What is done to the socket on which descriptors are handed over."""
