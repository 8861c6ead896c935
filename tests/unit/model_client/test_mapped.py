"""Sequences in the client's own process: how a session gets them, what others see, and how it loses them."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from memstore.v1 import memstore_pb2 as pb
from model_client import MemoryClient, Retrieval, errors
from model_client.transport import mapped
from tests.leasing import client_of, content, create, rows, until
from tests.serving import serving

if TYPE_CHECKING:
    from model_client import Session
    from tests.serving import Serving


pytestmark = pytest.mark.usefixtures("asked_again_at_once")


def test_what_is_appended_here_others_read_at_once(server: Serving) -> None:
    with client_of(server) as client, client_of(server, "inline") as other:
        create(client)
        session = client.session("m", ["a", "b"])
        session.append(rows(1, 2, 3), [2, 1])
        assert (session.plane, client.transport) == ("shm", "shm")
        assert content(other.session("m", ["a", "b"])) == [1, 2]
        assert other.describe_memory("m").status.num_rows == 3
        assert (client.stats.leases, client.stats.mapped_steps) == (1, 1)
        assert client.stats.sent_bytes < 500
        assert session.plane == "shm", "reading takes no lease away"
        assert server.metrics.registry.get_sample_value("memstore_leases") == 1
        assert list(other.info().planes) == [pb.PLANE_INLINE, pb.PLANE_SHM]


def test_who_wants_the_same_sequence_goes_inline_and_both_go_on(server: Serving) -> None:
    with client_of(server) as client, client_of(server, "auto") as other:
        create(client)
        mine, theirs = client.session("m", ["a"]), other.session("m", ["a"])
        mine.append(rows(1), [1])
        assert theirs.append(rows(2), [1]).sequences[0].first_position == 1
        assert mine.append(rows(3), [1]).sequences[0].first_position == 2
        assert content(mine) == content(theirs) == [1, 2, 3]
        assert client.stats.failures == other.stats.failures == 0
        assert client.stats.lost_epochs == other.stats.lost_epochs == 0


def test_a_lease_is_taken_again_after_it_was_given_back(server: Serving) -> None:
    with client_of(server) as client, client_of(server, "inline") as other:
        create(client)
        session = client.session("m", ["a"])
        for number in range(4):
            session.append(rows(2 * number), [1])
            until(lambda: bool(session.append(rows(), [0])) and session.plane == "shm")
            other.session("m", ["a"]).append(rows(2 * number + 1), [1])
            until(lambda: session.plane == "inline")
        assert content(session) == list(range(8))
        assert client.stats.leases == 4


def request(session: Session, numbers: list[int], seq: int) -> pb.StepRequest:
    """A numbered append, as the session's transport has it."""
    made = pb.StepRequest(memory="m", append=True, writer="w")
    made.sequences.add(sequence="a", num_rows=len(numbers), seq=seq)
    session._core.transport.plane.write(rows(*numbers).unsqueeze(0), made.keys)
    return made


def send(session: Session, numbers: list[int], seq: int) -> pb.SequenceResult:
    answer = session._core.transport.call("Step", request(session, numbers, seq), 20.0).result(20)
    assert isinstance(answer, pb.StepResponse)
    return answer.sequences[0]


def test_an_append_that_is_sent_again_after_a_switch_is_applied_once(server: Serving) -> None:
    with client_of(server, "auto") as client, client_of(server, "inline") as other:
        create(client)
        session = client.session("m", ["a"])
        transport = session._core.transport
        assert isinstance(transport, mapped.MappedTransport)
        first = send(session, [1, 2], 0)
        until(lambda: session.plane == "shm")
        again = send(session, [1, 2], 0)
        assert (again.is_replay, again.first_position, again.epoch) == (True, 0, first.epoch)
        second = send(session, [3], 1)
        waiting = request(session, [4], 2)  # written for the engine in this process
        assert client.stats.mapped_steps == 2
        transport._retry_s = 100.0
        other.session("m", ["a"]).append(rows(9), [1])
        until(lambda: session.plane == "inline")
        again = send(session, [3], 1)
        assert (again.is_replay, again.first_position) == (True, second.first_position)
        answer = transport.call("Step", waiting, 20.0).result(20)
        assert isinstance(answer, pb.StepResponse)
        assert answer.sequences[0].first_position == 4
        assert client.stats.mapped_steps == 2
        assert content(session) == [1, 2, 3, 9, 4]


def test_an_answer_is_read_after_the_engine_that_gave_it_has_gone(server: Serving) -> None:
    with client_of(server) as client, client_of(server, "inline") as other:
        create(client)
        session = client.session("m", ["a"])
        session.append(rows(1, 2), [2])
        pending = session.start_step(rows(2), [1], retrieve=Retrieval(1), append=False)
        other.session("m", ["a"]).append(rows(3), [1])
        until(lambda: session.plane == "inline")
        until(lambda: bool(session.append(rows(), [0])) and session.plane == "shm")
        hits = pending.result().hits
        assert hits is not None
        assert hits.rows["key"].tolist() == [[2, 2]]


def test_a_server_that_takes_its_time_has_the_lease_back(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "OPEN_S", 0.2)
    monkeypatch.setattr(mapped, "FIRST_RETRY_S", 100.0)
    with client_of(server) as client:
        create(client)
        session = client.session("m", ["a"])
        session.append(rows(1), [1])
        (loaded,) = server.registry.all()
        (lease,) = loaded.engine.lender._leases
        is_free = threading.Event()
        server.registry.worker.control(is_free.wait)
        lease.ask_back()
        until(lambda: session.plane == "inline")
        pending = session.start_step(rows(2), [1], retrieve=None, append=True)
        is_free.set()
        assert pending.result().sequences[0].first_position == 1
        assert content(session) == [1, 2]
        assert (client.stats.leases, client.stats.orphaned_steps, client.stats.lost_epochs) == (1, 0, 0)


def test_a_dropped_memory_is_gone_for_its_holder_too(server: Serving) -> None:
    with client_of(server) as client, client_of(server, "inline") as other:
        create(client)
        session = client.session("m", ["a"])
        session.append(rows(1), [1])
        other.drop_memory("m")
        with pytest.raises(errors.NotFound):
            session.append(rows(2), [1])
        create(other)
        assert session.append(rows(3), [1]).sequences[0].first_position == 0
        assert content(session) == [3]


def test_a_client_that_is_closed_gives_everything_back(server: Serving) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with client_of(server) as client:
        create(client)
        first, second = client.session("m", ["a"]), client.session("m", ["b"])  # one that is collected gives back too
        first.append(rows(1), [1])
        second.step(rows(2), [1], retrieve=Retrieval(1), append=True)
        (loaded,) = server.registry.all()
        assert len(loaded.engine.lender) == 2
    with client_of(server, "inline") as other:
        assert other.session("m", ["a"]).append(rows(3), [1]).sequences[0].first_position == 1
        until(lambda: len(loaded.engine.lender) == 0)
        other.drop_memory("m")
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_plane_that_the_server_does_not_lend_is_an_error_where_it_is_demanded() -> None:
    with serving() as server, client_of(server) as client:
        create(client)
        session = client.session("m", ["a"])
        for _ in range(2):
            with pytest.raises(errors.NotAllowed):
                session.append(rows(1), [1])


def test_where_nothing_is_lent_all_goes_inline() -> None:
    with serving() as server, client_of(server, "auto") as client:
        create(client)
        session = client.session("m", ["a"])
        for number in range(5):
            session.append(rows(number), [1])
        assert content(session) == list(range(5))
        assert (session.plane, client.stats.leases, client.stats.failures) == ("inline", 0, 0)


def test_the_wrong_plane_is_refused(server: Serving) -> None:
    with client_of(server, "cuda") as client:
        create(client)
        with pytest.raises(errors.NotAllowed):
            client.session("m", ["a"]).append(rows(1), [1])


@pytest.mark.parametrize(("target", "plane"), [("10.0.0.1:7077", "shm"), ("localhost:1", "other")])
def test_a_plane_that_cannot_be_is_named_at_once(target: str, plane: str) -> None:
    with pytest.raises(ValueError, match="plane"):
        MemoryClient(target, plane=plane)  # type: ignore[arg-type]


def test_the_child_of_a_fork_leaves_the_lease_alone(server: Serving) -> None:
    with client_of(server) as client:
        create(client)
        session = client.session("m", ["a"])
        session.append(rows(1), [1])
        transport = session._core.transport
        assert isinstance(transport, mapped.MappedTransport)
        transport._process_id += 1  # as the child sees it
        before = client.stats.mapped_steps
        answer = transport.call("Step", request(session, [2], 0), 1.0)
        assert isinstance(answer.exception(20), errors.NotReady), "its parent has the sequence"
        assert client.stats.mapped_steps == before
        transport._process_id -= 1
