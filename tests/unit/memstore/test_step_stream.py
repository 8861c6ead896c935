"""Streams of steps over a real gRPC server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import grpc
import pytest
from grpc._cython.cygrpc import ExecuteBatchError

from memstore.errors import (
    NotReady,
)
from memstore.grpc_front import SERVICE, Arrived, Steps
from memstore.v1 import memstore_pb2 as pb
from tests.calling import Conversation, fails, failure, until_queued, until_streams_ended
from tests.fakes import FakeClock, held
from tests.serving import Serving, Setting, serving, spec, step

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from memstore.arrival import Context


def test_a_stream_answers_in_order_and_goes_on_after_a_failure(server: Serving) -> None:
    talk = Conversation(server)
    for call_id, request in enumerate([step(), step(seq=7), step(layers=[3]), step(seq=1)]):
        talk.say(call_id, request)
    answers = [talk.hear() for _ in range(4)]
    assert [answer.call_id for answer in answers] == [0, 1, 2, 3]
    assert [answer.WhichOneof("outcome") for answer in answers] == ["step", "failure", "failure", "step"]
    gap = answers[1].failure
    assert (gap.reason, gap.metadata["expected_seq"]) == ("SEQUENCE_GAP", "1")
    assert answers[2].failure.metadata["field"] == "layers"
    talk.end()
    assert list(talk.answers) == []


def test_a_stream_has_several_steps_under_way_up_to_a_bound(server: Serving) -> None:
    talk = Conversation(server)
    with held(server.registry.worker):
        for call_id in range(6):
            talk.say(call_id, step(seq=call_id))
        until_queued(server, 4)
        assert server.registry.worker.admission.num_requests == 4
    assert [talk.hear().step.sequences[0].first_position for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    talk.end()


def test_a_step_of_a_stream_has_its_own_deadline(server: Serving) -> None:
    talk = Conversation(server)
    with held(server.registry.worker):
        talk.say(1, step(), timeout_s=0.02)
        late = talk.hear()
    assert late.failure.reason == "EXPIRED"
    assert late.failure.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    talk.say(2, step(), timeout_s=30)
    on_time = talk.hear()
    assert on_time.step.sequences[0].first_position == 0  # the late one never reached the engine
    talk.end()


def test_a_stream_of_nonsense_ends_with_what_it_was(shared: Serving) -> None:
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = shared.channel.stream_stream(
        f"/{SERVICE.full_name}/StepStream"
    )
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter([b"\xff\xff\xff"])))
    assert failure(caught.value).message == "request: not a StepStreamRequest"


def test_a_stream_that_is_cut_leaves_what_is_queued_undone(server: Serving) -> None:
    talk = Conversation(server)
    with held(server.registry.worker):
        talk.say(0, step())
        until_queued(server, 1)
        talk.answers.cancel()
        until_streams_ended(server)
    talk.end()
    counted = server.stub.DescribeMemory(pb.DescribeMemoryRequest(name="notes")).memory.status
    assert counted.appended_rows == 0


class Gone:
    """The context of a stream whose other end goes away before the first answer."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None

    async def write(self, _: object) -> None:
        raise ExecuteBatchError("SendMessageOperation")


def test_a_reader_that_has_gone_is_no_bug(server: Serving, caplog: pytest.LogCaptureFixture) -> None:
    async def requests() -> AsyncIterator[Steps]:
        for seq in range(3):
            request = pb.StepStreamRequest(call_id=seq, step=step(seq=seq))
            yield Arrived(request, request.ByteSize())

    context = cast("Context", Gone())
    asyncio.run_coroutine_threadsafe(server.front._stream(requests(), context), server.loop).result()
    labels = {"method": "StepStream", "code": "CANCELLED"}
    assert server.metrics.registry.get_sample_value("memstore_rpc_server_duration_seconds_count", labels) == 1
    assert caplog.text == ""
    server.registry.worker.control(lambda: None).result()
    assert server.registry.worker.admission.num_requests == 0


def test_draining_answers_what_was_read_and_ends_the_stream(server: Serving) -> None:
    talk = Conversation(server)
    with held(server.registry.worker):
        talk.say(1, step())
        until_queued(server, 1)
        server.drain()
    assert talk.hear().step.sequences[0].num_appended == 1
    with pytest.raises(grpc.RpcError) as caught:
        talk.hear()
    assert isinstance(failure(caught.value), NotReady)
    talk.end()
    assert isinstance(fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec("more"))), NotReady)


def test_a_late_step_never_reaches_the_engine() -> None:
    clock = FakeClock()
    with serving(Setting(clock=clock)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))
        talk = Conversation(server)
        with held(server.registry.worker):
            talk.say(1, step(), timeout_s=0.5)
            until_queued(server, 1)
            clock.advance(1)
        assert talk.hear().failure.reason == "EXPIRED"
        talk.end()
        counted = server.stub.DescribeMemory(pb.DescribeMemoryRequest(name="notes")).memory.status
        assert counted.appended_rows == 0
