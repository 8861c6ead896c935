"""Leases: who is given one, how many there are, and what becomes of what a claim brings."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from memstore import descriptors, lending
from memstore.arrival import is_local
from memstore.catalog import FileCatalog
from memstore.seams import SystemDisk
from memstore.v1 import memstore_pb2 as pb
from model_client import MemoryClient, Retrieval, errors
from tests.calling import hashed, tokens
from tests.fakes import FakeClock, held
from tests.leasing import CAPACITY, client_of, content, create, rows, until
from tests.serving import Setting, serving

if TYPE_CHECKING:
    from pathlib import Path

    from tests.serving import Serving


pytestmark = pytest.mark.usefixtures("asked_again_at_once")


def test_a_tenant_cannot_have_the_memory_of_another() -> None:
    known = tokens(hashed("one", "first"), hashed("two", "second"))
    wanted = pb.OpenPlaneRequest(memory="m", sequences=["b"], writer="w")
    with serving(Setting(lends=True, authenticator=known)) as server:
        with client_of(server, token="one") as client, client_of(server, token="two") as other:  # noqa: S106
            create(client)
            assert isinstance(other._transport.call("OpenPlane", wanted, 10.0).exception(10), errors.NotFound)
            assert client._transport.call("OpenPlane", wanted, 10.0).exception(10) is None
        with client_of(server, token="none") as stranger:  # noqa: S106
            assert isinstance(
                stranger._transport.call("OpenPlane", wanted, 10.0).exception(10), errors.NotAuthenticated
            )


def test_a_lease_is_asked_back_once_its_token_has_expired() -> None:
    clock = FakeClock()
    known = tokens(hashed("one", "first", "expires=1970-01-01T00:16:50Z"), hashed("two", "first"), clock=clock)
    with serving(Setting(lends=True, authenticator=known)) as server, client_of(server, token="one") as client:  # noqa: S106
        create(client)
        session = client.session("m", ["a"])
        session.append(rows(1), [1])
        session.step(rows(2), [1], retrieve=Retrieval(1), append=True)
        (loaded,) = server.registry.all()
        assert server.lending is not None
        for now, is_recalled in ((1009.0, False), (1010.0, True)):
            clock.now = now
            server.loop.call_soon_threadsafe(server.lending.recall_unwelcome)
            with client_of(server, "inline", token="two") as other:  # noqa: S106
                other.info()  # what was asked for in the loop is done, and then what that asked for
            server.registry.worker.control(lambda: None, behind="first").result()
            if not is_recalled:
                assert [lease.is_recalled for lease in loaded.engine.lender._leases] == [False]
        until(lambda: len(loaded.engine.lender) == 0)
        with pytest.raises(errors.NotAuthenticated):
            session.append(rows(3), [1])
        assert loaded.engine.counts().num_rows == 2


@pytest.mark.parametrize("peer", ["ipv4:10.0.0.1:5", "ipv6:[2001:db8::1]:5", "ipv4:128.0.0.1:9", "vsock:1:2", ""])
def test_nothing_is_lent_to_another_host(peer: str) -> None:
    assert not is_local(peer)


@pytest.mark.parametrize("peer", ["ipv4:127.0.0.1:5", "ipv6:[::1]:5", "ipv6:%5B::1%5D:5", "unix:", "unix:/tmp/s"])
def test_this_host_is_known(peer: str) -> None:
    assert is_local(peer)


def test_leases_are_bounded(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "MAX_LEASES", 1)
    with client_of(server, "auto") as client:
        create(client)
        first, second = client.session("m", ["a"]), client.session("m", ["b"])
        until(lambda: bool(first.append(rows(1), [1])) and first.plane == "shm")
        for _ in range(5):
            second.append(rows(1), [1])
        assert second.plane == "inline"


@pytest.mark.parametrize(("limit", "names"), [("MAX_LEASES", ["b"]), ("MAX_LENT", ["b", "c"])])
def test_offers_count_as_leases_until_they_lapse(
    server: Serving, monkeypatch: pytest.MonkeyPatch, limit: str, names: list[str]
) -> None:
    monkeypatch.setattr(lending, limit, {"MAX_LEASES": 1, "MAX_LENT": 2}[limit])
    monkeypatch.setattr(descriptors, "OFFER_S", 0.3)
    with client_of(server, "inline") as client:
        create(client)

        def ask(sequences: list[str]) -> Exception | None:
            wanted = pb.OpenPlaneRequest(memory="m", sequences=sequences, writer="w")
            error = client._transport.call("OpenPlane", wanted, 10.0).exception(10)
            assert error is None or isinstance(error, errors.QuotaExceeded)
            return error

        assert ask(["a"]) is None
        assert ask(names) is not None
        until(lambda: ask(names) is None)


def open_memfds(name: str) -> int:
    """Descriptors of this process that stand for memory of this name."""
    return sum(f"memfd:{name}" in link for link in map(link_of, os.listdir("/proc/self/fd")))


def link_of(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # it was that of the listing
        return ""


@pytest.mark.parametrize("state", ["sick", "well"])
def test_what_a_claim_brings_is_closed_whatever_becomes_of_it(server: Serving, state: str) -> None:
    with client_of(server, "inline") as client, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        create(client)
        wanted = pb.OpenPlaneRequest(memory="m", sequences=["a"], writer="w")
        offer = client._transport.call("OpenPlane", wanted, 10.0).result()
        assert isinstance(offer, pb.OpenPlaneResponse)
        server.registry.worker.is_sick = state == "sick"
        link.connect(offer.socket_path)
        claim = pb.ClaimRequest(token=offer.token, remains=pb.MappedMemory(num_sequences=1))
        brought = [os.memfd_create("brought") for _ in range(2)]
        socket.send_fds(link, [claim.SerializeToString()], brought)
        answer = link.recv(1 << 16)
        assert (answer == b"") == (state == "sick")
        until(lambda: open_memfds("brought") == len(brought))
        for descriptor in brought:
            os.close(descriptor)
        server.registry.worker.is_sick = False


def test_a_lease_counts_until_its_sequences_are_the_servers_again() -> None:
    known = tokens(hashed("one", "first"), "quota first leases=1")
    wanted = pb.OpenPlaneRequest(memory="m", sequences=["a"], writer="w")
    with serving(Setting(lends=True, authenticator=known)) as server:
        with client_of(server, "inline", token="one") as client:  # noqa: S106
            create(client)

            def ask() -> pb.OpenPlaneResponse:
                offer = client._transport.call("OpenPlane", wanted, 10.0).result(10)
                assert isinstance(offer, pb.OpenPlaneResponse)
                return offer

            offer = ask()
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
                link.connect(offer.socket_path)
                link.send(pb.ClaimRequest(token=offer.token).SerializeToString())
                answer = pb.ClaimResponse.FromString(link.recv(1 << 16))
                assert answer.mapped.num_sequences == 1
                (holder,) = server.lending.holders if server.lending is not None else ()
                ended = threading.Event()
                assert holder._link is not None
                on_close = holder._link.on_close
                holder._link.on_close = lambda: (on_close(), ended.set())[0]
                with held(server.registry.worker):
                    link.close()
                    assert ended.wait(10)
                    for _ in range(2):  # what the end had the loop do is done
                        with pytest.raises(errors.QuotaExceeded, match="leases"):
                            ask()
            until(lambda: not holder._lending.holders)
            ask()


def test_memories_are_listed_though_the_holder_of_a_lease_has_written_nonsense(server: Serving) -> None:
    with client_of(server) as client, client_of(server, "inline") as other:
        create(client)
        client.create_memory("n", dim=2, capacity=CAPACITY, max_sequences=2, dtype=torch.float32)
        session = client.session("m", ["a"])
        until(lambda: bool(session.append(rows(1), [1])) and session.plane == "shm")
        (lease,) = next(each for each in server.registry.all() if each.id.name == "m").engine.lender._leases
        table = lease.block.table()
        table[0, 1] = -5
        lease.block.publish(table)
        assert [each.spec.name for each in other.list_memories()] == ["m", "n"]
        assert other.describe_memory("m").spec.name == "m"


def test_a_claim_that_is_not_for_this_host_comes_to_nothing(server: Serving) -> None:
    """A server behind a proxy: its socket is not here."""
    with client_of(server, "auto") as client:
        create(client)
        assert server.lending is not None
        handover = server.lending._handover
        real, handover.path = handover.path, "/nowhere/socket"
        session = client.session("m", ["a"])
        for number in range(3):
            session.append(rows(number), [1])
        assert content(session) == [0, 1, 2]
        assert session.plane == "inline"
        handover.path = real


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_successor_is_given_what_a_server_held(tmp_path: Path) -> None:
    setting = Setting(lends=True, port=free_port(), catalog=FileCatalog(tmp_path, SystemDisk()))
    with serving(setting) as server:
        client = MemoryClient(server.target, plane="shm", timeout_s=20.0)
        create(client)
        session = client.session("m", ["a", "b"])
        epoch = session.append(rows(1, 2, 3), [2, 1]).sequences[0].epoch
    with client:
        until(lambda: client.stats.orphaned_steps > 0 or not session.append(rows(4), [1], parts=[0]))
        numbers = content(session)
        assert numbers[:3] == [1, 2, 4]
        with serving(setting) as successor:
            until(lambda: client.stats.leases == 2)
            result = session.append(rows(5, 6), [1, 1]).sequences
            assert [each.first_position for each in result] == [len(numbers), 1]
            assert result[0].epoch == epoch
            with client_of(successor, "inline") as other:
                assert content(other.session("m", ["a"])) == [*numbers, 5]
                assert content(other.session("m", ["b"])) == [3, 6]
            assert client.stats.lost_epochs == 0
            assert session.plane == "shm"


def test_remains_of_another_spec_are_refused() -> None:
    setting = Setting(lends=True, port=free_port())
    with serving(setting) as server:
        client = MemoryClient(server.target, plane="shm", timeout_s=20.0)
        create(client)
        session = client.session("m", ["a"])
        session.append(rows(1), [1])
    with client, serving(setting):
        client.create_memory("m", dim=2, capacity=CAPACITY + 1, dtype=torch.float32, exist_ok=True)
        until(lambda: session.plane == "inline")
        assert session.append(rows(2), [1]).sequences[0].first_position == 0
        assert client.stats.lost_epochs == 1
