"""Retries, the breaker and the counters, over a transport that answers as the test says."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TYPE_CHECKING

import pytest
import torch

from memstore.v1 import memstore_pb2 as pb
from model_client import AsyncMemoryClient, MemoryClient, Retrieval, errors
from model_client.wire import InlinePlane
from tests.faulty import FakeClock

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from model_client import ClientStats

INFO = pb.ServerInfoResponse(version="9")


class Scripted:
    """Answers each call with the next entry of the script: a message, an error, or None for no answer at all."""

    name = "scripted"

    def __init__(self, *script: Message | errors.MemstoreClientError | None) -> None:
        self.plane = InlinePlane()
        self.script = list(script)
        self.timeouts: list[float] = []

    def call(self, method: str, request: Message, timeout_s: float) -> Future[Message]:
        """The next entry."""
        self.timeouts.append(timeout_s)
        answer: Future[Message] = Future()
        entry = self.script.pop(0)
        if isinstance(entry, errors.MemstoreClientError):
            answer.set_exception(entry)
        elif entry is not None:
            answer.set_result(entry)
        return answer

    def close(self) -> None:
        """Nothing to end."""


def ask(
    transport: Scripted, clock: FakeClock, mode: str, **options: float
) -> tuple[pb.ServerInfoResponse, ClientStats]:
    timeout_s = options.get("timeout_s", 5.0)
    if mode == "sync":
        client = MemoryClient(transport=transport, clock=clock, timeout_s=timeout_s)
        return client.info(), client.stats
    other = AsyncMemoryClient(transport=transport, clock=clock, timeout_s=timeout_s)
    return asyncio.run(other.info()), other.stats


both = pytest.mark.parametrize("mode", ["sync", "asyncio"])


@both
@pytest.mark.parametrize("kind", [errors.NotReady, errors.Unavailable])
def test_not_now_is_tried_again_with_growing_pauses(mode: str, kind: type[errors.MemstoreClientError]) -> None:
    clock = FakeClock()
    transport = Scripted(kind("x"), kind("x"), kind("x", retry_after_s=0.5), INFO)
    reply, stats = ask(transport, clock, mode)
    assert reply.version == "9"
    assert clock.pauses == [0.05, 0.1, 0.5]
    assert transport.timeouts == pytest.approx([5.0, 4.95, 4.85, 4.35])
    assert (stats.calls, stats.retries, stats.failures) == (1, 3, 0)


@both
def test_overload_is_waited_out_once(mode: str) -> None:
    clock = FakeClock()
    assert ask(Scripted(errors.Overloaded("x", retry_after_s=0.2), INFO), clock, mode)[0] == INFO
    assert clock.pauses == [0.2]
    with pytest.raises(errors.Overloaded):
        ask(Scripted(*[errors.Overloaded("x", retry_after_s=0.2)] * 2), clock, mode)


@both
@pytest.mark.parametrize("error", [errors.NotReady("x"), errors.Overloaded("x", retry_after_s=0.05)])
def test_nothing_is_tried_beyond_the_deadline(mode: str, error: errors.MemstoreClientError) -> None:
    clock = FakeClock()
    with pytest.raises(type(error)):
        ask(Scripted(error), clock, mode, timeout_s=0.05)
    assert clock.pauses == []


@both
@pytest.mark.parametrize("kind", [errors.InvalidRequest, errors.NotFound, errors.Expired, errors.Late, errors.Internal])
def test_other_answers_are_final(mode: str, kind: type[errors.MemstoreClientError]) -> None:
    with pytest.raises(kind):
        ask(Scripted(kind("x")), FakeClock(), mode)


@both
def test_no_answer_is_late_at_the_deadline(mode: str) -> None:
    clock = FakeClock()
    with pytest.raises(errors.Late):
        ask(Scripted(None), clock, mode, timeout_s=0.5)
    assert clock.now == 1000.5


def test_a_reply_of_another_kind_is_internal() -> None:
    with pytest.raises(errors.Internal, match="ServerInfoResponse expected, ResetResponse received"):
        ask(Scripted(pb.ResetResponse()), FakeClock(), "sync")


def test_what_is_not_ours_is_internal() -> None:
    class Broken(Scripted):
        def call(self, method: str, request: Message, timeout_s: float) -> Future[Message]:
            answer: Future[Message] = Future()
            answer.set_exception(KeyError("oops"))
            return answer

    with pytest.raises(errors.Internal, match="oops"):
        ask(Broken(), FakeClock(), "sync")


@pytest.mark.parametrize("call", ["fork", "drop", "create"])
def test_what_cannot_be_repeated_is_not(call: str) -> None:
    transport = Scripted(errors.NotReady("x"), errors.Unavailable("x"), errors.Unavailable("x"))
    client = MemoryClient(transport=transport, clock=FakeClock())
    with pytest.raises(errors.Unavailable):
        if call == "fork":
            client.fork("m", "a", "b")
        elif call == "drop":
            client.drop_memory("m")
        else:
            client.create_memory("m", dim=2, capacity=2)
    assert len(transport.script) == 1


def test_the_breaker_opens_and_spares_the_network() -> None:
    clock = FakeClock()
    transport = Scripted(*[errors.Unavailable("x")] * 3, INFO)
    client = MemoryClient(transport=transport, clock=clock, timeout_s=0.01, breaker_failures=3, breaker_s=2.0)
    for _ in range(3):
        with pytest.raises(errors.Unavailable):
            client.info()
    session = client.session("m", ["a"])
    pending = session.start_step(torch.zeros(3, 2), [3], retrieve=Retrieval(1), append=True)
    assert pending.done()
    for _ in range(2):
        with pytest.raises(errors.CircuitOpen):
            pending.result()
    assert (client.stats.skipped, client.stats.dropped_rows, client.stats.failures) == (1, 3, 4)
    clock.now += 2.0
    assert client.info() == INFO
    assert client.stats.as_dict()["calls"] == 5


def test_a_bad_request_says_that_the_server_is_well() -> None:
    transport = Scripted(errors.Unavailable("x"), errors.NotFound("x"), errors.Unavailable("x"), INFO)
    client = MemoryClient(transport=transport, clock=FakeClock(), timeout_s=0.01, breaker_failures=2)
    for kind in (errors.Unavailable, errors.NotFound, errors.Unavailable):
        with pytest.raises(kind):
            client.info()
    assert client.info() == INFO


def test_a_shorter_wait_makes_a_step_late_for_good() -> None:
    transport = Scripted(None)
    clock = FakeClock()
    client = MemoryClient(transport=transport, clock=clock, timeout_s=5.0)
    pending = client.session("m", ["a"]).start_step(torch.zeros(1, 2), [1], retrieve=Retrieval(1), append=False)
    assert not pending.done()
    for _ in range(2):
        with pytest.raises(errors.Late):
            pending.result(timeout_s=0.25)
    assert clock.now == 1000.25
    assert client.stats.late == 1
    assert client.stats.waited_s == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("keys", "counts", "options"),
    [
        (torch.zeros(3, 2), [2], {}),
        (torch.zeros(3), [3], {}),
        (torch.zeros(3, 2, dtype=torch.float64), [3], {}),
        (torch.zeros(3, 2), [3], {"payloads": {"hidden": torch.zeros(3, 4, dtype=torch.complex64)}}),
        (torch.zeros(3, 2), [2, 1], {}),
        (torch.zeros(3, 2), [3], {"start_of_sequence": [True, False]}),
        (torch.zeros(3, 2), [3], {"parts": [0, 1]}),
        (torch.zeros(3, 2), [3], {"payloads": {"hidden": torch.zeros(2, 4)}}),
    ],
)
def test_shapes_that_disagree_are_refused_at_once(
    keys: torch.Tensor, counts: list[int], options: dict[str, object]
) -> None:
    session = MemoryClient(transport=Scripted()).session("m", ["a"])
    with pytest.raises(errors.InvalidRequest):
        session.start_step(keys, counts, retrieve=None, append=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sequences", [[], ["a", "a"]])
def test_a_session_has_each_sequence_once(sequences: list[str]) -> None:
    with pytest.raises(errors.InvalidRequest):
        MemoryClient(transport=Scripted()).session("m", sequences)


def test_an_answer_about_a_sequence_that_was_not_asked_for_is_internal() -> None:
    changed = errors.EpochChanged("x", metadata={"sequence": "z", "epoch": "3"})
    client = MemoryClient(transport=Scripted(changed), clock=FakeClock())
    with pytest.raises(errors.Internal):
        client.session("m", ["a"]).append(torch.zeros(1, 2), [1])


def test_epochs_that_never_rest_end_in_an_error() -> None:
    changed = [errors.EpochChanged("x", metadata={"sequence": "a", "epoch": str(n)}) for n in range(1, 9)]
    client = MemoryClient(transport=Scripted(*changed), clock=FakeClock())
    with pytest.raises(errors.Internal, match="faster"):
        client.session("m", ["a"]).append(torch.zeros(1, 2), [1])


def test_a_session_that_is_busy_says_nothing_about_the_server() -> None:
    client = MemoryClient(transport=Scripted(None, INFO), clock=FakeClock(), breaker_failures=1)
    session = client.session("m", ["a"])
    pendings = [session.start_step(torch.zeros(1, 2), [1], retrieve=None, append=True) for _ in range(3)]
    with pytest.raises(errors.Busy):
        pendings[2].result()
    assert client.info() == INFO
