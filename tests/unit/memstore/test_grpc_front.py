"""Calls over a real gRPC server: bad inputs, errors, deadlines, queues and credentials."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from memstore.admission import QueueLimits
from memstore.errors import (
    AlreadyExists,
    Internal,
    InvalidRequest,
    NotAuthenticated,
    NotFound,
    Overloaded,
    QuotaExceeded,
)
from memstore.grpc_front import SERVICE
from memstore.plane import InlinePlane
from memstore.v1 import memstore_pb2 as pb
from memstore.v1 import memstore_pb2_grpc
from memstore.wire import MAX_MESSAGE_BYTES
from tests.bad_requests import OTHERS, SPECS, STEPS
from tests.calling import Conversation, bearer, fails, failure, hashed, method_of, tokens, until_queued
from tests.fakes import held
from tests.serving import Serving, Setting, serving, spec, step, tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.protobuf.message import Message

    from memstore.errors import MemstoreError
    from memstore.types import Hits, StepBatch, StepResult

PLANE = InlinePlane(MAX_MESSAGE_BYTES)
HEALTH = health_pb2.HealthCheckResponse


BAD = [(name, pb.CreateMemoryRequest(spec=bad), field) for name, bad, field in SPECS] + STEPS + OTHERS


@pytest.mark.parametrize(("request_", "field"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_names_its_field_and_changes_nothing(shared: Serving, request_: Message, field: str) -> None:
    before = shared.stub.ListMemories(pb.ListMemoriesRequest())
    error = fails(shared, method_of(request_), request_)
    assert isinstance(error, InvalidRequest)
    assert error.metadata == {"field": field}
    assert error.message.startswith(f"{field}: ")
    assert shared.stub.ListMemories(pb.ListMemoriesRequest()) == before


@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods if not method.client_streaming])
def test_bytes_that_are_no_message_are_bad_input(shared: Serving, method: str) -> None:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = shared.channel.unary_unary(f"/{SERVICE.full_name}/{method}")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff")
    assert failure(caught.value).message == f"request: not a {method}Request"


def test_a_message_beyond_the_limit_is_refused_by_the_transport(shared: Serving) -> None:
    big = step(keys=pb.Tensor(dtype=pb.DATA_TYPE_FP32, shape=[1, 1, 4], data=bytes(MAX_MESSAGE_BYTES)))
    with pytest.raises(grpc.RpcError) as caught:
        shared.stub.Step(big)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_memory_lives_its_life(server: Serving) -> None:
    stub = server.stub
    assert stub.ServerInfo(pb.ServerInfoRequest()).planes == [pb.PLANE_INLINE]
    created = stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("more", num_layers=1)))
    assert created.created
    assert created.memory.spec.metric == pb.METRIC_L2
    assert not stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("more", num_layers=1), exist_ok=True)).created
    names = [memory.spec.name for memory in stub.ListMemories(pb.ListMemoriesRequest()).memories]
    assert names == ["more", "notes"]
    first = stub.Step(step(rows=2))
    assert (first.sequences[0].first_position, first.sequences[0].num_appended) == (0, 2)
    second = stub.Step(step(rows=1, seq=1))
    assert second.sequences[0].as_of == 2
    assert PLANE.read(second.hits.positions, "positions").tolist() == [0, 1]
    assert stub.Step(step(rows=1, seq=1)).sequences[0].is_replay
    memory = stub.DescribeMemory(pb.DescribeMemoryRequest(name="notes")).memory
    assert (memory.status.num_rows, memory.status.num_sequences) == (3, 1)
    retrieve = pb.RetrieveRequest(
        memory="notes",
        sequences=[pb.SequencePart(sequence="a", num_rows=1)],
        retrieve=pb.RetrieveOptions(top_k=1),
        keys=tensor(torch.zeros(1, 1, 4)),
    )
    assert PLANE.read(stub.Retrieve(retrieve).hits.positions, "positions").tolist() == [0]
    forked = stub.Fork(pb.ForkRequest(memory="notes", source="a", target="b", as_of=2))
    assert (forked.next_position, forked.live_begin) == (2, 0)
    append = pb.AppendRequest(
        memory="notes", sequences=[pb.SequencePart(sequence="b", num_rows=1)], keys=tensor(torch.ones(1, 1, 4))
    )
    assert stub.Append(append).sequences[0].first_position == 2
    epochs = stub.Reset(pb.ResetRequest(memory="notes", sequences=["a", "none"])).epochs
    assert epochs[0] not in (0, first.sequences[0].epoch)
    assert epochs[1] == 0
    stub.DropMemory(pb.DropMemoryRequest(name="notes"))
    assert isinstance(fails(server, "Step", step()), NotFound)


def test_errors_of_the_state_travel_as_what_they_are(server: Serving) -> None:
    assert isinstance(fails(server, "Step", step(memory="none")), NotFound)
    assert isinstance(fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec())), AlreadyExists)
    server.stub.Step(step())
    other = step(keys=tensor(torch.ones(1, 1, 4)))
    assert isinstance(fails(server, "Step", other), AlreadyExists)
    gap = fails(server, "Step", step(seq=5))
    assert gap.metadata["expected_seq"] == "1"


def test_a_reply_beyond_a_message_is_refused(server: Serving) -> None:
    wide = spec("wide", dim=4, capacity=20)
    del wide.payloads[:]
    wide.payloads.add(name="page", dtype=pb.DATA_TYPE_UINT8, shape=[1 << 22])
    server.stub.CreateMemory(pb.CreateMemoryRequest(spec=wide))
    for seq in range(17):
        server.stub.Append(
            pb.AppendRequest(
                memory="wide",
                sequences=[pb.SequencePart(sequence="a", num_rows=1, seq=seq)],
                writer="w",
                payloads=[
                    pb.NamedTensor(name="page", tensor=PLANE.write(torch.zeros(1, 1, 1 << 22, dtype=torch.uint8)))
                ],
                keys=tensor(torch.full((1, 1, 4), float(seq))),
            )
        )
    ask = step(memory="wide", append=False, retrieve=pb.RetrieveOptions(top_k=17, arrays=["page"]))
    error = fails(server, "Step", ask)
    assert isinstance(error, QuotaExceeded)
    assert int(error.metadata["reply_bytes"]) > 64 << 20
    ask.retrieve.top_k = 3
    assert len(server.stub.Step(ask).hits.arrays[0].tensor.data) == 3 << 22


def test_requests_of_two_clients_are_searched_together(server: Serving) -> None:
    loaded = server.registry.find("default", "notes")
    calls: list[int] = []
    real_step = loaded.engine.step

    def counted(batches: Sequence[StepBatch], carry: Callable[[int, Hits], None]) -> list[StepResult | MemstoreError]:
        calls.append(len(batches))
        return real_step(batches, carry)

    loaded.engine.step = counted  # type: ignore[method-assign]
    with grpc.insecure_channel(server.target) as other, ThreadPoolExecutor(2) as pool:
        stubs = (server.stub, memstore_pb2_grpc.MemoryServiceStub(other))
        with held(server.registry.worker):
            replies = [pool.submit(stub.Step, step((name,))) for stub, name in zip(stubs, "ab", strict=True)]
            until_queued(server, 2)
        assert all(reply.result().sequences[0].num_appended == 1 for reply in replies)
    assert calls == [2]


def test_a_full_queue_says_when_to_come_back() -> None:
    with serving(Setting(limits=QueueLimits(max_requests=1))) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))
        with held(server.registry.worker):
            waiting = server.stub.Step.future(step())
            until_queued(server, 1)
            with pytest.raises(grpc.RpcError) as caught:
                server.stub.Step(step(("b",)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(failure(caught.value), Overloaded)
        retry = error_details_pb2.RetryInfo()
        assert any(detail.Unpack(retry) for detail in rpc_status.from_call(caught.value).details)
        assert retry.retry_delay.ToMilliseconds() >= 5
        assert waiting.result().sequences[0].num_appended == 1


def test_a_client_that_stops_waiting_leaves_nothing_behind(server: Serving) -> None:
    with held(server.registry.worker):
        gone = server.stub.Step.future(step())
        until_queued(server, 1)
        gone.cancel()
        admission = server.registry.worker.admission
        while admission.num_requests < 2:  # a busy machine may not even have sent it by then
            with pytest.raises(grpc.RpcError) as caught:
                server.stub.Step(step(("b",)), timeout=0.05)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until_given_up(server, lambda: admission.num_requests)
    held_status = server.stub.DescribeMemory(pb.DescribeMemoryRequest(name="notes")).memory.status
    assert held_status.appended_rows == 0


def until_given_up(server: Serving, number: Callable[[], int]) -> None:
    """Returns once the server has heard of so many steps that nobody waits for them any more."""
    name, labels = "memstore_rpc_server_duration_seconds_count", {"method": "Step", "code": "CANCELLED"}
    while (server.metrics.registry.get_sample_value(name, labels) or 0) < number():
        server.stub.ServerInfo(pb.ServerInfoRequest())


def trailer(call: grpc.Call | grpc.RpcError) -> str:
    """The request id that a call came back with."""
    pairs: list[tuple[str, str]] = [(item[0], str(item[1])) for item in call.trailing_metadata()]  # type: ignore[index]
    return dict(pairs)["x-request-id"]


def test_request_ids_come_back(shared: Serving) -> None:
    given = (("x-request-id", "mine-1"),)
    _, call = shared.stub.ServerInfo.with_call(pb.ServerInfoRequest(), metadata=given)
    assert trailer(call) == "mine-1"
    with pytest.raises(grpc.RpcError) as caught:
        shared.stub.Step(step(memory="none"), metadata=(("x-request-id", "not a good id"),))
    assert re.fullmatch("[0-9a-f]{16}", trailer(caught.value))


def test_a_bug_shows_its_number_and_not_its_text(server: Serving, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> object:
        raise RuntimeError("/etc/passwd")

    server.registry.find("default", "notes").engine.step = fail  # type: ignore[method-assign, assignment]
    error = fails(server, "Step", step(), metadata=(("x-request-id", "bug-1"),))
    assert isinstance(error, Internal)
    assert error.metadata == {"request_id": "bug-1"}
    assert "passwd" not in error.message
    assert "passwd" in caplog.text


def test_a_bug_outside_of_the_device_thread_shows_no_text_either(
    server: Serving, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> object:
        raise RuntimeError("/etc/passwd")

    monkeypatch.setattr(server.registry, "listing", fail)
    monkeypatch.setattr(server.registry, "find", fail)
    assert isinstance(fails(server, "ListMemories", pb.ListMemoriesRequest()), Internal)
    assert "passwd" in caplog.text
    talk = Conversation(server)
    talk.say(1, step())
    with pytest.raises(grpc.RpcError) as caught:
        talk.hear()
    assert isinstance(failure(caught.value), Internal)
    talk.end()


def test_every_method_wants_a_token_and_tenants_do_not_meet() -> None:
    known = tokens(hashed("r", "red"), hashed("b", "blue"))
    with serving(Setting(authenticator=known)) as server:
        for method in SERVICE.methods:
            if method.client_streaming:
                with pytest.raises(grpc.RpcError) as caught:
                    list(server.stub.StepStream(iter([])))
                assert isinstance(failure(caught.value), NotAuthenticated)
            else:
                request = getattr(pb, method.input_type.name)()
                assert isinstance(fails(server, method.name, request, metadata=bearer("no")), NotAuthenticated)
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()), metadata=bearer("r"))
        assert isinstance(fails(server, "Step", step(), metadata=bearer("b")), NotFound)
        assert server.stub.Step(step(), metadata=bearer("r")).sequences[0].num_appended == 1
        assert len(server.stub.ListMemories(pb.ListMemoriesRequest(), metadata=bearer("b")).memories) == 0
        health = health_pb2_grpc.HealthStub(server.channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == HEALTH.SERVING
        with pytest.raises(grpc.RpcError) as caught:  # names are for those who have a token
            health.Check(health_pb2.HealthCheckRequest(service="memory/notes"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_tenant_is_that_of_the_credential_whatever_the_call_says() -> None:
    names = ("tenant", "tenant-id", "x-tenant", "x-tenant-id", "x-memstore-tenant", "memstore-tenant", "user", "x-user")
    claims = tuple((name, "red") for name in names)
    known = tokens(hashed("r", "red"), hashed("b", "blue"))
    with serving(Setting(authenticator=known)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()), metadata=bearer("r"))
        metadata = (*bearer("b"), *claims)
        assert isinstance(fails(server, "Step", step(), metadata=metadata), NotFound)
        assert isinstance(
            fails(server, "DescribeMemory", pb.DescribeMemoryRequest(name="notes"), metadata=metadata), NotFound
        )
        assert len(server.stub.ListMemories(pb.ListMemoriesRequest(), metadata=metadata).memories) == 0
        asked = iter([pb.StepStreamRequest(call_id=1, step=step())])
        (reply,) = server.stub.StepStream(asked, metadata=metadata)
        assert reply.failure.reason == "NOT_FOUND"
        for name in ("red/notes", "../red/notes", "notes@red"):
            assert isinstance(fails(server, "Step", step(memory=name), metadata=metadata), InvalidRequest | NotFound)
