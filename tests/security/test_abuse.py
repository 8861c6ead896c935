"""A server of its own process under attack on each of its ports: its memory is bounded, it goes on, and it lets go."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import grpc
import pytest

from memstore import listen, metrics
from memstore.listen import SERVER_OPTIONS
from memstore.metrics import Metrics, MetricsServer
from memstore.v1 import memstore_pb2 as pb
from tests import serving as serving_module
from tests.calling import bearer, hashed
from tests.processes import Usage
from tests.security import attacks
from tests.security.attacks import Target
from tests.security.victim import KEPT_BYTES, OPEN_BYTES, Victim
from tests.serving import Setting, serving

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

    from tests.security.victim import Attack

pytestmark = pytest.mark.timeout(120)
NUMBER = int(os.environ.get("ABUSE", "50"))
UNPACKED_BYTES = 192 << 20
"""What a message may take that is unpacked until it is too large: the longest one, and what copies and buffers add."""
STRANGERS_BYTES = 64 << 20
"""What those may make a server take who have no credential, beside what open connections cost."""


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end has closed it, now or within a moment."""
    connection.settimeout(5.0)
    try:
        while connection.recv(1 << 16):
            """What it still said."""
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = {"grpc.server_handshake_timeout_ms": 200}
    assert limit.keys() < dict(SERVER_OPTIONS).keys()
    monkeypatch.setattr(serving_module, "SERVER_OPTIONS", tuple({**dict(SERVER_OPTIONS), **limit}.items()))
    with serving(Setting()) as server:
        (connection,) = attacks.dripping(Target(server.target), 1)
        assert is_closed(connection)
        connection.close()


def test_connections_are_bounded_and_leave_room_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 100))
    assert listen.max_connections() == 50
    limit = {"grpc.max_allowed_incoming_connections": 5}
    assert limit.keys() < dict(SERVER_OPTIONS).keys()
    monkeypatch.setattr(serving_module, "SERVER_OPTIONS", tuple({**dict(SERVER_OPTIONS), **limit}.items()))
    with serving(Setting()) as server:
        server.stub.ServerInfo(pb.ServerInfoRequest())
        opened = attacks.silent(Target(server.target), 10)
        assert is_closed(opened[-1])
        server.stub.ServerInfo(pb.ServerInfoRequest())
        for connection in opened:
            connection.close()


def test_the_port_of_metrics_has_few_connections_and_ends_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(metrics, "CONNECTION_S", 3600.0)
    server = MetricsServer(("127.0.0.1", 0), Metrics([], "0", 2), lambda: True)
    try:
        opened = attacks.silent(Target(f"127.0.0.1:{server.port}"), 4)
        assert is_closed(opened[-1])
        monkeypatch.setattr(metrics, "CONNECTION_S", 0.1)
        assert all(is_closed(connection) for connection in opened)
        for connection in opened:
            connection.close()
    finally:
        server.close()


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    made = Victim(tmp_path_factory.mktemp("victim"))
    yield made
    made.close()


@pytest.mark.parametrize("attack", attacks.GRPC, ids=lambda attack: attack.__name__)
def test_the_port_of_calls_endures(victim: Victim, attack: Attack) -> None:
    victim.endure(attack, victim.front, NUMBER)


@pytest.mark.parametrize("attack", attacks.HTTP, ids=lambda attack: attack.__name__)
def test_the_port_of_metrics_endures(victim: Victim, attack: Attack) -> None:
    victim.endure(attack, victim.metrics, NUMBER)


@pytest.mark.parametrize("attack", attacks.PACKETS, ids=lambda attack: attack.__name__)
def test_the_socket_of_descriptors_endures(victim: Victim, attack: Attack) -> None:
    victim.endure(attack, victim.sockets, NUMBER)


def test_messages_of_strangers_are_not_held(tmp_path: Path) -> None:
    """With tokens, whoever has none makes the server hold hardly anything, whatever it would send if it were let."""
    path = tmp_path / "tokens"
    path.write_text(f"{hashed('t', 'red')}\n")
    victim = Victim(tmp_path, "--token-file", str(path), metadata=bearer("t"))
    try:
        victim.endure(attacks.strangers, victim.front, NUMBER)
        allowed = STRANGERS_BYTES + OPEN_BYTES * (NUMBER // 5)
        assert Usage.of(victim.pid).peak_bytes < victim.before.peak_bytes + allowed
    finally:
        victim.close()


def test_what_large_messages_took_is_given_back(victim: Victim) -> None:
    """Of the longest messages that there may be glibc would keep 180 MB and more, for good."""
    with grpc.insecure_channel(victim.front.address) as channel:
        call = channel.unary_unary("/memstore.v1.MemoryService/Step", bytes, bytes)
        for _ in range(3):
            with pytest.raises(grpc.RpcError):
                call(bytes(60 << 20), timeout=60)
    victim.until(lambda now: now.rss_bytes <= victim.before.rss_bytes + KEPT_BYTES)


def test_a_message_that_grows_beyond_its_limit_is_not_unpacked(victim: Victim) -> None:
    """400 MB of nothing, which are 400 KB when they are sent."""
    before = Usage.of(victim.pid)
    with grpc.insecure_channel(victim.front.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        call = channel.unary_unary("/memstore.v1.MemoryService/Step", bytes, bytes)
        with pytest.raises(grpc.RpcError) as refused:
            call(bytes(400 << 20), timeout=60, compression=grpc.Compression.Gzip)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    assert Usage.of(victim.pid).peak_bytes < before.peak_bytes + UNPACKED_BYTES
    victim.serve()


def test_a_unix_socket_endures(tmp_path: Path) -> None:
    victim = Victim(tmp_path, "--unix-socket", str(tmp_path / "socket"))
    try:
        for attack in attacks.GRPC:
            victim.endure(attack, victim.front, NUMBER)
    finally:
        victim.close()
