"""Descriptors: file descriptors handed to processes of the same user on this host, over a Unix socket.

A caller who has proven over gRPC who it is gets a token, and presents it on the socket. What the token stands for takes
the connection over, sends descriptors on it, and learns from its end that the other process has gone.
"""

from __future__ import annotations

import array
import logging
import os
import secrets
import shutil
import socket
import struct
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from memstore.logs import event, trouble
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Iterator, Sequence

OFFER_S = 10.0
"""How long a token is good, and how long a connection may say nothing before it has presented one."""
ACCEPT_AGAIN_S = 1.0
MAX_STRANGERS = 64
"""Connections that have not presented a token yet; beyond it, one more is closed at once."""
MAX_PACKET_BYTES = 64 << 10
TOKEN_BYTES = 32

STALE_S = 60.0
"""Age of a socket that nobody listens on after which it is one of a killed process, and not of one that begins."""

_PREFIX = "memstore-"
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_PEER = struct.Struct("3i")
"""struct ucred: process, user, group."""
_DESCRIPTOR = struct.Struct("i")
MAX_DESCRIPTORS = 2
"""Descriptors that are taken from one packet."""
_ROOM = socket.CMSG_SPACE(MAX_DESCRIPTORS * _DESCRIPTOR.size)
_log = logging.getLogger(__name__)


def peer_user(connection: socket.socket) -> int:
    """The user that the process at the other end of a Unix socket ran as when it connected or listened."""
    _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(user)


class Link:
    """A connection to one process. Lives on an event loop; `send` may be called from any thread.

    Packets arrive at `on_packet`, which may take the descriptors that came with them. `on_close` is called once, in the
    loop, when either end has closed the connection.
    """

    def __init__(self, connection: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self.on_packet: Callable[[bytes], None] = _nobody
        self.on_close: Callable[[], None] = _nothing
        self._connection = connection
        self._loop = loop
        self._buffer = bytearray(MAX_PACKET_BYTES + 1)
        self._descriptors: list[int] = []
        self._is_closed = False
        self._sending = threading.Lock()  # nothing is sent to whoever has the descriptor next
        loop.add_reader(connection.fileno(), self._receive)

    def send(self, packet: bytes, descriptors: Sequence[int] = ()) -> bool:
        """Sends one packet and, with it, duplicates of descriptors; never waits.

        False where the other end has gone or does not read: the link is closed then.
        """
        try:
            with self._sending:
                if descriptors:  # socket.send_fds takes flags and forgets them
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
                    self._connection.sendmsg([packet], [rights], _SEND_FLAGS)
                else:
                    self._connection.send(packet, _SEND_FLAGS)
        except OSError:
            self._loop.call_soon_threadsafe(self.close)
            return False
        return True

    def close(self) -> None:
        """Closes the connection, in the loop. May be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._connection.fileno())
        with self._sending:
            self._connection.close()
        self._buffer = bytearray()
        on_close, self.on_packet, self.on_close = self.on_close, _nobody, _nothing  # or they would keep each other
        on_close()

    def take_descriptors(self) -> list[int]:
        """What came with the packet that is being heard, and is the caller's to close from now on."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def _receive(self) -> None:
        try:
            length, ancillary, _, _ = self._connection.recvmsg_into(
                [self._buffer], _ROOM, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            length, ancillary = 0, []
        self._descriptors = list(_descriptors(ancillary))
        try:
            self._hear(length)
        finally:
            for descriptor in self.take_descriptors():
                os.close(descriptor)

    def _hear(self, length: int) -> None:
        if not 0 < length <= MAX_PACKET_BYTES:
            self.close()
            return
        try:
            self.on_packet(bytes(memoryview(self._buffer)[:length]))
        except Exception as error:  # the root: a bug ends this link, not the loop
            trouble(_log, "packet failed", error)
            self.close()


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> Iterator[int]:
    """The descriptors that came with a packet; the kernel has closed those that there was no room for."""
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(content) - len(content) % _DESCRIPTOR.size
            yield from (number for (number,) in _DESCRIPTOR.iter_unpack(content[:whole]))


class Handover:
    """A listening Unix socket in a folder that only this user can open. Lives on one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, folder: Path | None = None) -> None:
        """folder: where to put the socket's own folder; the system's temporary folder if None. Raises OSError."""
        self._loop = loop
        self._offers: dict[bytes, Callable[[Link, pb.ClaimRequest], None]] = {}
        self._strangers: set[Link] = set()
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))  # mode 0700
        _sweep(self._folder)
        self.path = str((self._folder / "socket").absolute())
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listen()
        except OSError:
            self.close()
            raise

    def _listen(self) -> None:
        before = os.umask(0o177)
        try:
            self._socket.bind(self.path)
        finally:
            os.umask(before)
        self._socket.listen(MAX_STRANGERS)
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def offer(self, claim: Callable[[Link, pb.ClaimRequest], None], lapse: Callable[[], None]) -> bytes:
        """A token; `claim` is called in the loop with the connection of the first who presents it in time, and how.

        lapse: is called instead where nobody did.
        """
        token = secrets.token_bytes(TOKEN_BYTES)
        self._offers[token] = claim
        self._loop.call_later(OFFER_S, self._lapse, token, lapse)
        return token

    def close(self) -> None:
        """Ends listening, in the loop, and takes the folder away; links that were claimed go on."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._offers.clear()
        for stranger in tuple(self._strangers):
            stranger.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptors left: the connection waits, and is asked for again later
            trouble(_log, "connection not accepted", error)
            self._loop.remove_reader(self._socket.fileno())
            self._loop.call_later(ACCEPT_AGAIN_S, self._resume)
            return
        if peer_user(connection) != os.geteuid() or len(self._strangers) >= MAX_STRANGERS:
            event(_log, logging.WARNING, "connection refused", user=peer_user(connection))
            connection.close()
            return
        link = Link(connection, self._loop)
        patience = self._loop.call_later(OFFER_S, link.close)

        def forget() -> None:
            patience.cancel()
            self._strangers.discard(link)

        def present(packet: bytes) -> None:
            link.on_packet, link.on_close = _nobody, _nothing
            forget()
            self._present(link, packet)

        self._strangers.add(link)
        link.on_packet, link.on_close = present, forget

    def _lapse(self, token: bytes, lapse: Callable[[], None]) -> None:
        if self._offers.pop(token, None) is not None:
            lapse()

    def _resume(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def _present(self, link: Link, packet: bytes) -> None:
        try:
            request = pb.ClaimRequest.FromString(packet)
        except DecodeError:
            request = pb.ClaimRequest()
        claim = self._offers.pop(request.token, None)
        if claim is None:
            link.close()
        else:
            claim(link, request)


def _sweep(mine: Path) -> None:
    """Takes away what killed processes of this user have left of their sockets beside this new folder."""
    now = mine.stat().st_mtime
    for path in mine.parent.glob(f"{_PREFIX}*/socket"):
        try:
            about = path.parent.stat()
            if about.st_uid != os.geteuid() or now - about.st_mtime < STALE_S:
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                probe.setblocking(False)
                probe.connect(str(path))
        except ConnectionRefusedError:
            shutil.rmtree(path.parent, ignore_errors=True)
        except OSError:  # it is gone, or somebody is there and busy
            continue


def _nobody(_: bytes) -> None:
    """A packet that nobody waits for."""


def _nothing() -> None:
    """Nobody needs to know."""
