"""Descriptors over a Unix socket: to whom, against which token, and what is left when either end goes."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import stat
import threading
import weakref
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvloop

from memstore import descriptors
from memstore.descriptors import MAX_PACKET_BYTES, Handover, Link
from memstore.v1 import memstore_pb2 as pb
from model_client import errors
from model_client.transport import descriptors as client

if TYPE_CHECKING:
    from collections.abc import Iterator

MISSING = pb.ClaimResponse(failure=pb.Failure(code=5, reason="NOT_FOUND", message="nothing there"))
REGION = pb.ClaimResponse(mapped=pb.MappedMemory(lease=7))


class Host:
    """A handover on a loop of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, folder: Path) -> None:
        self.loop = loop
        self.handover = self.run(lambda: Handover(loop, folder))
        self.links: list[Link] = []
        self.packets: list[bytes] = []
        self.gone: Future[None] = Future()

    def run(self, function: object) -> object:
        """Calls a function in the loop."""

        async def call() -> object:
            return function()  # type: ignore[operator]

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    def offer(self, response: pb.ClaimResponse = REGION, handed: tuple[int, ...] = ()) -> pb.OpenPlaneResponse:
        """An offer that is answered so."""

        def claimed(link: Link, request: pb.ClaimRequest) -> None:
            self.links.append(link)
            link.on_packet = self.packets.append
            link.on_close = lambda: self.gone.set_result(None)
            link.send(response.SerializeToString(), handed)

        token = self.run(lambda: self.handover.offer(claimed, lambda: None))
        return pb.OpenPlaneResponse(socket_path=self.handover.path, token=token)  # type: ignore[arg-type]


def test_a_link_that_has_ended_keeps_neither_its_buffer_nor_whom_it_told() -> None:
    """The collector of cycles may come late: servers that lend again and again grew by what links kept."""

    class Owner:
        def __init__(self, link: Link) -> None:
            self.link, self.has_gone = link, False
            link.on_packet, link.on_close = self.hear, self.go

        def hear(self, packet: bytes) -> None:
            """Not called."""

        def go(self) -> None:
            self.has_gone = True

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    loop = uvloop.new_event_loop()
    gc.disable()
    try:
        link = Link(ours, loop)
        owner = Owner(link)
        link.close()
        assert owner.has_gone
        assert not link._buffer
        remembered = weakref.ref(owner)
        del owner
        assert remembered() is None
    finally:
        gc.enable()
        theirs.close()
        loop.close()


def test_nothing_is_sent_on_a_descriptor_that_is_another_ones_by_then() -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    class Connection:
        def fileno(self) -> int:
            return 0

        def send(self, packet: bytes, flags: int) -> None:
            begun.set()
            go_on.wait()
            done.append("sent")

        def close(self) -> None:
            done.append("closed")

    class Loop:
        def add_reader(self, *_: object) -> None:
            pass

        def remove_reader(self, *_: object) -> None:
            pass

    link = Link(Connection(), Loop())  # type: ignore[arg-type]
    sending, closing = threading.Thread(target=link.send, args=(b"x",)), threading.Thread(target=link.close)
    sending.start()
    begun.wait()
    closing.start()
    closing.join(0.05)
    go_on.set()
    sending.join()
    closing.join()
    assert done == ["sent", "closed"]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with looping() as loop:
        made = Host(loop, tmp_path)
        yield made
        made.run(made.handover.close)
        for link in made.links:
            made.run(link.close)


@contextmanager
def looping() -> Iterator[asyncio.AbstractEventLoop]:
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def connect(host: Host) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(10)
    made.connect(host.handover.path)
    return made


def test_a_descriptor_is_handed_over_against_its_token(host: Host) -> None:
    region = os.memfd_create("region")
    os.write(region, b"rows")
    claim = client.claim(host.offer(handed=(region,)), 1, 10)
    os.close(region)
    assert claim.response == REGION
    assert os.pread(claim.descriptors[0], 10, 0) == b"rows"
    assert not os.get_inheritable(claim.descriptors[0])
    os.close(claim.descriptors[0])
    claim.connection.close()
    host.gone.result(10)


def test_packets_go_both_ways_once_it_is_claimed(host: Host) -> None:
    claim = client.claim(host.offer(), 0, 10)
    echoed: Future[bytes] = Future()

    def echo(packet: bytes) -> None:
        echoed.set_result(packet)
        host.links[0].send(packet * 2)

    host.links[0].on_packet = echo
    claim.connection.send(b"ring")
    assert (echoed.result(10), claim.connection.recv(100)) == (b"ring", b"ringring")
    claim.connection.close()


def test_a_token_is_good_once(host: Host) -> None:
    offer = host.offer()
    client.claim(offer, 0, 10).connection.close()
    with pytest.raises(errors.Unavailable):
        client.claim(offer, 0, 10)


@pytest.mark.parametrize("packet", [b"\xff\xff", b"x", pb.ClaimRequest(token=bytes(32)).SerializeToString()])
def test_who_has_no_token_is_sent_away(host: Host, packet: bytes) -> None:
    with connect(host) as stranger:
        stranger.send(packet)
        assert stranger.recv(100) == b""


def test_a_token_expires(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "OFFER_S", 0.0)
    offer = host.offer()
    host.run(lambda: None)
    with pytest.raises(errors.Unavailable):
        client.claim(offer, 0, 10)


def test_who_says_nothing_is_not_waited_for(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "OFFER_S", 0.0)
    with connect(host) as silent:
        assert silent.recv(100) == b""


def test_strangers_are_bounded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "MAX_STRANGERS", 1)
    with connect(host), connect(host) as second:
        assert second.recv(100) == b""


def test_another_user_is_sent_away(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "peer_user", lambda connection: os.geteuid() + 1)
    with connect(host) as other:
        assert other.recv(100) == b""


def test_a_server_of_another_user_is_not_believed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_peer_user", lambda connection: os.geteuid() + 1)
    with pytest.raises(errors.Unavailable, match="another user"):
        client.claim(host.offer(), 0, 10)


def test_a_packet_beyond_the_limit_ends_the_link(host: Host) -> None:
    claim = client.claim(host.offer(), 0, 10)
    claim.connection.send(bytes(MAX_PACKET_BYTES + 1))
    host.gone.result(10)
    claim.connection.close()


def test_a_reader_that_does_not_read_is_not_waited_for(host: Host) -> None:
    claim = client.claim(host.offer(), 0, 10)
    while host.links[0].send(bytes(1000)):
        pass
    host.gone.result(10)
    claim.connection.close()


def test_descriptors_that_nobody_asked_for_are_not_kept(host: Host) -> None:
    claim = client.claim(host.offer(), 0, 10)
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(claim.connection, [b"take these"], [0, 0, 0])
    claim.connection.close()
    host.gone.result(10)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_bug_ends_its_link_only(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    claim = client.claim(host.offer(), 0, 10)

    def fail(packet: bytes) -> None:
        raise RuntimeError("bug")

    host.links[0].on_packet = fail
    claim.connection.send(b"ring")
    host.gone.result(10)
    claim.connection.close()
    assert "packet failed" in caplog.text


def test_only_its_owner_can_open_the_socket_and_nothing_is_left_of_it(host: Host) -> None:
    path = Path(host.handover.path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    host.run(host.handover.close)
    assert not path.parent.exists()
    with pytest.raises(errors.Unavailable):
        client.claim(pb.OpenPlaneResponse(socket_path=str(path), token=bytes(32)), 0, 10)


def test_what_a_killed_process_left_of_its_socket_is_taken_away(host: Host, tmp_path: Path) -> None:
    def left(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(folder / "socket"))
        return folder

    old, new, other = left("memstore-old"), left("memstore-new"), left("something")
    alive = Path(host.handover.path).parent
    for folder in (old, other, alive):
        os.utime(folder, (0, 0))
    second = host.run(lambda: Handover(host.loop, tmp_path))
    assert isinstance(second, Handover)
    host.run(second.close)
    assert [folder.exists() for folder in (old, new, other, alive)] == [False, True, True, True]


def test_a_refusal_arrives_as_it_is(host: Host) -> None:
    with pytest.raises(errors.NotFound, match="nothing there"):
        client.claim(host.offer(MISSING), 0, 10)


@pytest.mark.parametrize("handed", [(), (0, 0, 0)])
def test_other_descriptors_than_expected_are_closed(host: Host, handed: tuple[int, ...]) -> None:
    with pytest.raises(errors.Internal, match="descriptors"):
        client.claim(host.offer(handed=handed), 1, 10)
    assert host.gone.result(10) is None
