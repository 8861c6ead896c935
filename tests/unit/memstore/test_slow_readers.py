"""Answers over gRPC that nobody takes: what they hold is bounded over all callers, and does not last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch

from memstore.errors import Overloaded
from memstore.grpc_front import FrontLimits
from memstore.plane import InlinePlane
from memstore.v1 import memstore_pb2 as pb
from model_client import MemoryClient, Retrieval
from tests.calling import Conversation, fails, failure, until_streams_ended
from tests.serving import Serving, Setting, serving, spec, step, tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 1 << 22
"""Beyond what the network takes in for a reader that does not read."""

PIECE = 1 << 16
ROWS = 3
ASK: dict[str, Any] = {
    "memory": "pages",
    "append": False,
    "retrieve": pb.RetrieveOptions(top_k=ROWS, arrays=["page"], omit_scores=True),
}


def pages(server: Serving) -> torch.Tensor:
    """A memory of one sequence with three pages; the pages."""
    described = spec("pages", capacity=ROWS, max_sequences=1)
    described.payloads.add(name="page", dtype=pb.DATA_TYPE_UINT8, shape=[PAGE])
    server.stub.CreateMemory(pb.CreateMemoryRequest(spec=described))
    page = torch.arange(ROWS * PAGE, dtype=torch.int64).mul_(7).to(torch.uint8).view(1, ROWS, PAGE)
    server.stub.Append(
        pb.AppendRequest(
            memory="pages",
            sequences=[pb.SequencePart(sequence="a", num_rows=ROWS)],
            payloads=[pb.NamedTensor(name="page", tensor=InlinePlane(1 << 26).write(page))],
            keys=tensor(torch.arange(12.0).view(1, 3, 4)),
        )
    )
    return page[0]


@pytest.fixture
def server() -> Iterator[Serving]:
    with serving(Setting(front=FrontLimits(stream_in_flight=4, reply_bytes=8 * PAGE))) as running:
        yield running


def until_held(server: Serving, least: int) -> None:
    """Returns once so much waits to be taken; the test's own time limit ends it otherwise."""
    while server.front.replies.held_bytes < least:
        server.stub.ServerInfo(pb.ServerInfoRequest())


def until_free(server: Serving) -> None:
    """Returns once nothing waits to be taken."""
    while server.front.replies.held_bytes:
        server.stub.ServerInfo(pb.ServerInfoRequest())


def test_a_large_answer_comes_in_pieces_and_is_what_it_is_as_a_whole(server: Serving) -> None:
    expected = pages(server)
    talk = Conversation(server)
    talk.say(4, step(**ASK), max_piece_bytes=PIECE)
    first = talk.hear()
    messages = [first, *(talk.hear() for _ in range(-(-first.pieces_bytes // PIECE) - 1))]
    assert {each.call_id for each in messages} == {4}
    assert [each.WhichOneof("outcome") for each in messages] == ["step"] + [None] * (len(messages) - 1)
    content = b"".join(each.piece for each in messages)
    region = first.step.hits.arrays[0].tensor.region
    assert content[region.offset_bytes :][: region.length_bytes] == expected.numpy().tobytes()
    until_free(server)
    talk.say(5, step(**ASK), max_piece_bytes=0)
    whole = talk.hear()
    assert (whole.call_id, whole.pieces_bytes, whole.piece) == (5, 0, b"")
    assert whole.step.hits.arrays[0].tensor.data == expected.numpy().tobytes()
    talk.end()


@pytest.mark.parametrize("use_stream", [True, False])
def test_the_client_gets_the_same_either_way(server: Serving, use_stream: bool) -> None:
    expected = pages(server)
    with MemoryClient(server.target, use_stream=use_stream) as client:
        session = client.session("pages", ["a"])
        for _ in range(3):
            retrieval = Retrieval(ROWS, arrays=("page", "key"))
            hits = session.retrieve(torch.zeros(1, 4), [1], retrieval).hits
            assert hits is not None
            assert torch.equal(hits.rows["page"], expected)
            assert hits.rows["key"].flatten().tolist() == list(range(12))
            assert hits.index.flatten().tolist() == [0, 1, 2]
            hits.rows["page"].zero_()  # the caller's own
            until_free(server)


@pytest.mark.parametrize("most", [-1, 1, PIECE - 1])
def test_pieces_that_are_too_short_are_bad_input(server: Serving, most: int) -> None:
    server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))
    talk = Conversation(server)
    talk.say(1, step(), max_piece_bytes=most)
    failure = talk.hear().failure
    assert (failure.reason, failure.metadata["field"]) == ("INVALID_REQUEST", "max_piece_bytes")
    talk.say(2, step())
    assert talk.hear().step.sequences[0].first_position == 0
    talk.end()


@pytest.mark.parametrize("most", [0, PIECE])
def test_a_reader_that_does_not_read_holds_one_answer_and_the_others_go_on(server: Serving, most: int) -> None:
    expected = pages(server)
    idle = Conversation(server)
    for call_id in range(4):
        idle.say(call_id, step(**ASK), max_piece_bytes=most)
    until_held(server, ROWS * PAGE)
    busy = Conversation(server)
    for call_id in range(3):
        busy.say(call_id, step(**ASK))
        assert busy.hear().step.hits.arrays[0].tensor.data == expected.numpy().tobytes()
    while server.front.replies.held_bytes >= (ROWS + 1) * PAGE:  # what was taken is let go of
        server.stub.ServerInfo(pb.ServerInfoRequest())
    assert server.front.replies.held_bytes >= ROWS * PAGE
    answers = [idle.hear()]
    while len(answers) < 4:
        message = idle.hear()
        answers += [message] if message.WhichOneof("outcome") else []
    assert answers[0].HasField("step")
    assert all(each.HasField("step") or each.failure.reason == "OVERLOADED" for each in answers)
    until_free(server)
    for talk in (idle, busy):
        talk.end()


def test_a_step_behind_a_large_answer_is_not_begun_before_that_is_taken(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages(server)
    service, begun = server.front._service, []
    real = service.call

    def call(method: str, *others: Any) -> Any:
        begun.append(method)
        return real(method, *others)

    monkeypatch.setattr(service, "call", call)
    talk = Conversation(server)
    talk.say(1, step(**ASK), max_piece_bytes=PIECE)
    until_held(server, ROWS * PAGE)
    talk.say(2, step(memory="none"))
    for _ in range(20):  # long enough for it to arrive
        server.stub.ServerInfo(pb.ServerInfoRequest())
    assert begun.count("Step") == 1
    first = talk.hear()
    rest = [talk.hear() for _ in range(-(-first.pieces_bytes // PIECE) - 1)]
    assert {each.call_id for each in rest} == {1}
    assert talk.hear().failure.reason == "NOT_FOUND"
    assert begun.count("Step") == 2
    talk.end()


def test_over_all_streams_the_answers_are_bounded_and_what_does_not_fit_is_refused_undone(server: Serving) -> None:
    pages(server)
    idle = [Conversation(server) for _ in range(2)]
    for talk in idle:
        talk.say(1, step(**ASK), max_piece_bytes=PIECE)
    until_held(server, 2 * ROWS * PAGE)
    assert server.front.replies.held_bytes <= 8 * PAGE
    append = ASK | {"append": True, "payloads": [], "memory": "pages"}
    page = InlinePlane(1 << 26).write(torch.zeros(1, 1, PAGE, dtype=torch.uint8))
    refused = step(**append | {"payloads": [pb.NamedTensor(name="page", tensor=page)]})
    error = fails(server, "Step", refused)
    assert isinstance(error, Overloaded)
    assert "nothing was changed" in error.message
    described = server.stub.DescribeMemory(pb.DescribeMemoryRequest(name="pages")).memory
    assert described.status.appended_rows == ROWS
    for talk in idle:
        talk.answers.cancel()
        talk.end()
    until_streams_ended(server)
    until_free(server)
    assert server.stub.Step(refused).sequences[0].num_appended == 1


@pytest.mark.parametrize("most", [0, PIECE])
def test_a_stream_whose_answers_nobody_takes_is_given_up(most: int) -> None:
    limits = FrontLimits(stream_in_flight=4, reply_bytes=8 * PAGE, stall_s=0.05)
    with serving(Setting(front=limits)) as server:
        pages(server)
        talk = Conversation(server)
        talk.say(1, step(**ASK), max_piece_bytes=most)
        until_held(server, ROWS * PAGE)
        if most:  # a whole message is with gRPC already, and stays counted
            until_free(server)
        else:
            for _ in range(500):  # long enough
                server.stub.ServerInfo(pb.ServerInfoRequest())
        heard: list[pb.StepStreamResponse] = []
        with pytest.raises(grpc.RpcError) as caught:
            while True:
                heard.append(talk.hear())
        assert isinstance(failure(caught.value), Overloaded)
        assert {each.call_id for each in heard} == {1}
        until_free(server)
        talk.end()
