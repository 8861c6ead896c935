"""Tenants: nothing that one of them sees or counts says that there is another."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from memstore.admission import QueueLimits
from memstore.catalog import FileCatalog
from memstore.errors import DeviceMemoryFull, NotFound, Overloaded, QuotaExceeded
from memstore.grpc_front import SERVICE
from memstore.memory import Memory
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import decode_spec
from tests.calling import bearer, fails, hashed, tokens
from tests.fakes import FakeDisk, held
from tests.serving import Serving, Setting, serving, spec, step

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from google.protobuf.message import Message

RED, BLUE = bearer("r"), bearer("b")
TOKENS = tokens(hashed("r", "red"), hashed("b", "blue"))
SECRET = "crown-jewels"  # noqa: S105  a name of the other tenant's
SIZE = Memory.bytes_needed(decode_spec(spec()), torch.device("cpu"))
HERE = (("x-request-id", "mine"),)


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    """A server on which red has a memory with rows, and blue has nothing."""
    with serving(Setting(authenticator=TOKENS, lends=True)) as made:
        made.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(SECRET)), metadata=RED)
        made.stub.Step(step(memory=SECRET), metadata=RED)
        yield made


def request_of(method: str, memory: str) -> Message | None:
    """A good request of a method for a memory; None where it names none."""
    part = pb.SequencePart(sequence="a", num_rows=1)
    whole = step(memory=memory)
    requests: dict[str, Message | None] = {
        "CreateMemory": None,
        "ListMemories": None,
        "ServerInfo": None,
        "DescribeMemory": pb.DescribeMemoryRequest(name=memory),
        "DropMemory": pb.DropMemoryRequest(name=memory),
        "Step": whole,
        "StepStream": pb.StepStreamRequest(call_id=1, step=whole),
        "Retrieve": pb.RetrieveRequest(memory=memory, sequences=[part], retrieve=whole.retrieve, keys=whole.keys),
        "Append": pb.AppendRequest(memory=memory, sequences=[part], keys=whole.keys),
        "Reset": pb.ResetRequest(memory=memory, sequences=["a"]),
        "Fork": pb.ForkRequest(memory=memory, source="a", target="b"),
        "Pin": pb.PinRequest(memory=memory, sequences=["a"]),
        "OpenPlane": pb.OpenPlaneRequest(memory=memory, sequences=["a"], writer="w"),
    }
    return requests[method]


def answer(server: Serving, method: str, memory: str) -> str:
    """All that blue is told, in whatever way: code, text, details; the name of the memory taken out."""
    request = request_of(method, memory)
    metadata = (*BLUE, *HERE)
    try:
        if method == "StepStream":
            (reply,) = server.stub.StepStream(iter([request]), metadata=metadata)  # type: ignore[list-item]
            return str(reply).replace(memory, "NAME")
        reply = getattr(server.stub, method)(request, metadata=metadata)
    except grpc.RpcError as error:
        return f"{error.code()} {error.details()} {rpc_status.from_call(error)}".replace(memory, "NAME")
    return f"OK {reply}"


NAMING = [method.name for method in SERVICE.methods if request_of(method.name, "x") is not None]


@pytest.mark.parametrize("method", NAMING)
def test_what_is_anothers_is_answered_as_what_is_not_there(server: Serving, method: str) -> None:
    theirs = answer(server, method, SECRET)
    assert theirs == answer(server, method, "no-such-name")
    assert "NOT_FOUND" in theirs
    red = server.stub.DescribeMemory(pb.DescribeMemoryRequest(name=SECRET), metadata=RED).memory
    assert (red.status.num_rows, red.status.num_sequences) == (1, 1)


def test_listings_and_counts_are_of_the_caller_alone(server: Serving) -> None:
    assert len(server.stub.ListMemories(pb.ListMemoriesRequest(), metadata=BLUE).memories) == 0
    info = pb.ServerInfoRequest()
    assert server.stub.ServerInfo(info, metadata=BLUE).reserved_bytes == 0
    assert server.stub.ServerInfo(info, metadata=RED).reserved_bytes > 0


def test_a_name_that_another_has_is_free(server: Serving) -> None:
    made = server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(SECRET, num_layers=2)), metadata=BLUE)
    assert made.created
    server.stub.DropMemory(pb.DropMemoryRequest(name=SECRET), metadata=BLUE)
    red = server.stub.DescribeMemory(pb.DescribeMemoryRequest(name=SECRET), metadata=RED).memory
    assert (red.spec.num_layers, red.status.num_rows) == (1, 1)


def test_metrics_name_neither_tenants_nor_memories(server: Serving) -> None:
    answer(server, "Step", SECRET)
    text = server.metrics.text().decode()
    for word in (SECRET, "red", "blue"):
        assert f'"{word}' not in text
    assert 'memstore_memory_rows{memory="other"} 1.0' in text


def test_health_of_a_memory_is_for_its_tenant(server: Serving) -> None:
    stub = health_pb2_grpc.HealthStub(server.channel)
    request = health_pb2.HealthCheckRequest(service=f"memory/{SECRET}")
    assert stub.Check(request, metadata=RED).status == health_pb2.HealthCheckResponse.SERVING
    for metadata in ((), BLUE, bearer("wrong")):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(request, metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(request, metadata=metadata)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


def test_a_tenant_of_the_default_name_is_one_like_any_other() -> None:
    with serving(Setting(authenticator=tokens(hashed("r", "default")))) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(SECRET)), metadata=RED)
        with pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest(service=f"memory/{SECRET}"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_full_device_says_nothing_of_who_fills_it() -> None:
    with serving(Setting(authenticator=TOKENS, capacity_bytes=SIZE, max_memories=1)) as server:
        create = pb.CreateMemoryRequest(spec=spec("large", capacity=4096))
        alone = fails(server, "CreateMemory", create, metadata=BLUE)
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(SECRET)), metadata=RED)
        full = fails(server, "CreateMemory", create, metadata=BLUE)
        assert isinstance(alone, DeviceMemoryFull)
        assert isinstance(full, QuotaExceeded)
        assert not any(letter.isdigit() for letter in full.message)
        assert full.metadata == {}


def test_a_device_that_another_fills_says_what_a_small_device_says() -> None:
    def refusal(capacity_bytes: int, theirs: bool) -> str:
        with serving(Setting(authenticator=TOKENS, capacity_bytes=capacity_bytes)) as server:
            if theirs:
                server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(SECRET)), metadata=RED)
            error = fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec()), metadata=BLUE)
            assert isinstance(error, DeviceMemoryFull)
            return f"{error.message} {error.metadata}"

    assert refusal(SIZE + 10, theirs=True) == refusal(10, theirs=False)


def test_a_queue_that_another_fills_says_no_number() -> None:
    with serving(Setting(authenticator=TOKENS, limits=QueueLimits(max_requests=1))) as server:
        for metadata in (RED, BLUE):
            server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()), metadata=metadata)
        with held(server.registry.worker):
            waiting = server.stub.Step.future(step(), metadata=RED)
            while server.registry.worker.admission.num_requests < 1:
                server.stub.ServerInfo(pb.ServerInfoRequest(), metadata=BLUE)
            error = fails(server, "Step", step(), metadata=BLUE)
        assert isinstance(error, Overloaded)
        assert error.message == "the queue is full"
        waiting.result()


def test_a_damaged_memory_is_damaged_for_its_tenant_only(tmp_path: Path) -> None:
    disk = FakeDisk()
    catalog = FileCatalog(tmp_path, disk)
    with serving(Setting(authenticator=TOKENS, catalog=catalog)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(SECRET)), metadata=RED)
    ((memory, text),) = catalog.load().items()
    spoilt = json.loads(text)
    spoilt["spec"]["dim"] = -1
    catalog.put(memory, json.dumps(spoilt))
    with serving(Setting(authenticator=TOKENS, catalog=catalog)) as server:
        describe = pb.DescribeMemoryRequest(name=SECRET)
        assert fails(server, "DescribeMemory", describe, metadata=RED).__class__.__name__ == "Corrupt"
        assert isinstance(fails(server, "DescribeMemory", describe, metadata=BLUE), NotFound)


def test_while_memories_are_read_nobody_learns_which() -> None:
    with serving(Setting(authenticator=TOKENS), loads=False) as server:
        assert answer(server, "Step", SECRET) == answer(server, "Step", "no-such-name")
