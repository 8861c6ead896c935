"""Lanes: what a tenant asks for is done in the tenant's turns, and takes nothing of others'."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pytest
import torch

from memstore.admission import QueueLimits
from memstore.service import Service
from memstore.turns import SERVER
from memstore.v1 import memstore_pb2 as pb
from model_client import MemoryClient, Retrieval
from tests.calling import bearer, fails, hashed, tokens
from tests.loading import Cost, Load, Source, every
from tests.serving import Setting, serving, spec, step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.message import Message

    from memstore.jobs import Settling
    from memstore.rooms import Loaded
    from memstore.types import MemorySpec
    from tests.serving import Serving

RED, BLUE = bearer("r"), bearer("b")
CREATE_S = 0.02
"""What a memory takes to be made, or lent, in virtual time."""
SECONDS = 2.0


@pytest.fixture
def server() -> Iterator[Serving]:
    known = tokens(hashed("r", "red"), hashed("b", "blue"))
    with serving(Setting(authenticator=known, lends=True, limits=QueueLimits(leaves_room=True))) as made:
        yield made


@pytest.fixture
def lanes(server: Serving, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lane of each job that has been queued."""
    seen: list[str] = []
    turns = server.registry.worker._turns
    put = turns.put

    def noted(name: str, job: object) -> None:
        seen.append(name)
        put(name, job)  # type: ignore[arg-type]

    monkeypatch.setattr(turns, "put", noted)
    return seen


def test_whatever_a_tenant_asks_for_is_done_in_its_own_lane(server: Serving, lanes: list[str]) -> None:
    create = pb.CreateMemoryRequest(spec=spec(), exist_ok=True)
    for _ in range(2):
        server.stub.CreateMemory(create, metadata=RED)
    assert len(lanes) == 3, "one is made, and both are described"
    server.stub.Step(step(), metadata=RED)
    server.stub.Fork(pb.ForkRequest(memory="notes", source="a", target="b"), metadata=RED)
    server.stub.Pin(pb.PinRequest(memory="notes", sequences=["b"]), metadata=RED)
    server.stub.Reset(pb.ResetRequest(memory="notes", sequences=["b"]), metadata=RED)
    server.stub.DescribeMemory(pb.DescribeMemoryRequest(name="notes"), metadata=RED)
    server.stub.ListMemories(pb.ListMemoriesRequest(), metadata=RED)
    server.stub.DropMemory(pb.DropMemoryRequest(name="notes"), metadata=RED)
    assert set(lanes) == {"red"}


def test_a_memory_that_cannot_be_kept_is_freed_in_the_lane_of_its_tenant(
    server: Serving, lanes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server.registry._store, "create", fail)
    fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec()), metadata=RED)
    assert lanes == ["red", "red"]
    assert server.registry.budget.reserved_bytes == 0


def test_leases_are_given_recalled_and_taken_back_in_the_lane_of_their_tenant(
    server: Serving, lanes: list[str]
) -> None:
    with (
        MemoryClient(server.target, plane="shm", token="r") as client,  # noqa: S106
        MemoryClient(server.target, plane="inline", token="r") as other,  # noqa: S106
    ):
        client.create_memory("m", dim=2, capacity=4, max_sequences=2, dtype=torch.float32)
        rows = torch.ones(1, 2)
        session = client.session("m", ["a"])
        session.step(rows, [1], retrieve=Retrieval(1), append=True)
        assert (session.plane, client.stats.leases) == ("shm", 1)
        other.session("m", ["a"]).append(rows, [1])
        assert session.plane == "inline"
    assert set(lanes) == {"red"}
    assert SERVER not in lanes


def test_a_tenant_whose_queue_is_long_does_not_hold_up_what_others_make(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red's memory waits for red's turn; meanwhile blue makes one and drops it."""
    worker, waiting = server.registry.worker, Future[Any]()
    asked: list[Callable[[], object]] = []
    control = worker.control

    def slow(run: Callable[[], object], engine: Settling | None = None, *, behind: str = SERVER) -> Future[Any]:
        if behind != "red" or waiting.done():
            return control(run, engine, behind=behind)
        asked.append(run)
        return waiting

    monkeypatch.setattr(worker, "control", slow)
    create = pb.CreateMemoryRequest(spec=spec())
    made = server.stub.CreateMemory.future(create, metadata=RED)
    assert server.stub.CreateMemory(create, metadata=BLUE).created
    server.stub.DropMemory(pb.DropMemoryRequest(name="notes"), metadata=BLUE)
    while not asked:
        server.stub.ServerInfo(pb.ServerInfoRequest(), metadata=RED)
    assert not made.done()
    waiting.set_result(control(asked[0], behind="red").result())
    assert made.result().created


@pytest.mark.parametrize(
    ("call", "request_"),
    [
        ("ListMemories", pb.ListMemoriesRequest()),
        ("CreateMemory", pb.CreateMemoryRequest(spec=spec(), exist_ok=True)),
        ("DescribeMemory", pb.DescribeMemoryRequest(name="notes")),
    ],
)
def test_what_waits_for_its_tenants_turn_is_in_flight_until_it_is_answered(
    server: Serving, monkeypatch: pytest.MonkeyPatch, call: str, request_: Message
) -> None:
    server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()), metadata=RED)
    worker = server.registry.worker
    assert worker.admission.num_requests == 0
    begun, go_on = threading.Event(), threading.Event()
    describe = Service._description

    def slow(service: Service, memory: Loaded | MemorySpec) -> pb.MemoryDescription:
        begun.set()
        assert go_on.wait(10)
        return describe(service, memory)

    monkeypatch.setattr(Service, "_description", slow)
    answer = getattr(server.stub, call).future(request_, metadata=RED)
    assert begun.wait(10)
    assert worker.admission.num_requests == 1
    go_on.set()
    answer.result()
    assert worker.admission.num_requests == 0


def test_a_flood_of_memories_leaves_others_their_share() -> None:
    """As many as a tenant likes are made and lent, one after another, each of which takes as long as four turns."""
    good = Source(tenant="good", arrivals=every(0.001 / 0.45, SECONDS), patience_s=0.2)
    load = Load((good,), cost=Cost(call_s=0.0, row_s=0.001))
    num_made = 0

    def again(_: Future[None] | None = None) -> None:
        nonlocal num_made
        if load.clock.now < SECONDS:
            num_made += 1
            made = load.worker.control(lambda: load.pass_time(CREATE_S), behind="flood")
            made.add_done_callback(again)

    for _ in range(10):
        again()
    tally = load.run()["good"]
    assert tally.useful >= 0.8 * tally.offered
    assert num_made * CREATE_S >= 0.4 * SECONDS
