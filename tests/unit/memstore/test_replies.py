"""What replies hold until they are taken, and the messages that they leave in."""

from __future__ import annotations

import pytest
import torch

from memstore.errors import Overloaded
from memstore.replies import ALIGNMENT, Reader, ReplyBudget, ReplyPlane
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import answer_frames

TENSORS = [
    torch.arange(5, dtype=torch.int64),
    torch.arange(6, dtype=torch.int32).view(2, 3).T,
    torch.empty(0, 4, dtype=torch.float16),
    torch.arange(70_001, dtype=torch.uint8),
    torch.tensor(2.5, dtype=torch.bfloat16),
]


def filled(plane: ReplyPlane, tensors: list[torch.Tensor] = TENSORS) -> pb.StepResponse:
    """A reply with these tensors as arrays."""
    reply = pb.StepResponse(sequences=[pb.SequenceResult(epoch=7, as_of=3)])
    plane.fill([reply.hits.arrays.add(name="key").tensor for _ in tensors], tensors)
    return reply


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_all_readers_share_one_budget_and_a_lone_reply_always_fits() -> None:
    budget = ReplyBudget(100)
    first, *others = (Reader(budget) for _ in range(5))
    first.reserve(1000)
    with pytest.raises(Overloaded, match="no room for it now"):
        others[0].reserve(1)
    first.release(1000)
    for each in others:
        each.reserve(25)
    with pytest.raises(Overloaded) as caught:
        first.reserve(1)
    assert caught.value.retry_delay_s > 0
    others[0].release(25)
    first.reserve(25)
    assert budget.held_bytes == 100


def test_one_reader_has_a_quarter_or_one_reply() -> None:
    budget = ReplyBudget(100)
    reader = Reader(budget)
    reader.reserve(20)
    with pytest.raises(Overloaded, match="this caller has not yet taken 20"):
        reader.reserve(6)
    reader.reserve(5)
    reader.release(25)
    reader.reserve(60)
    with pytest.raises(Overloaded):
        reader.reserve(1)
    assert budget.held_bytes == 60


@pytest.mark.parametrize("call_id", [None, 9])
def test_a_reply_is_counted_until_it_is_released(call_id: int | None) -> None:
    budget = ReplyBudget(1 << 20)
    plane = ReplyPlane(Reader(budget), 1 << 20, call_id)
    filled(plane)
    assert budget.held_bytes == sum(tensor.nbytes for tensor in TENSORS)
    plane.release()
    plane.release()
    assert budget.held_bytes == 0
    filled(plane)  # the device had begun when the caller went away
    assert budget.held_bytes == 0


def test_a_reply_that_is_not_sent_is_not_counted() -> None:
    budget = ReplyBudget(1 << 20)
    plane = ReplyPlane(Reader(budget), 1 << 20, 9)
    plane.discard(filled(plane))
    assert budget.held_bytes == 0


@pytest.mark.parametrize("most", [1, 1000, 1 << 16, 1 << 20])
def test_the_slices_of_the_pieces_are_the_tensors(most: int) -> None:
    plane = ReplyPlane(Reader(ReplyBudget(1 << 20)), 1 << 20, 9)
    reply = filled(plane)
    pieces = [b"".join(piece) for piece in plane.pieces(most)]
    whole = b"".join(pieces)
    assert all(len(piece) == most for piece in pieces[:-1])
    assert len(whole) == plane.pieces_bytes
    for array, tensor in zip(reply.hits.arrays, TENSORS, strict=True):
        region = array.tensor.region
        assert region.offset_bytes % ALIGNMENT == 0
        assert (region.plane, region.region) == (pb.PLANE_INLINE, 9)
        assert whole[region.offset_bytes : region.offset_bytes + region.length_bytes] == bytes_of(tensor)
        assert tuple(array.tensor.shape) == tuple(tensor.shape)


@pytest.mark.parametrize("call_id", [0, 9, 2**63])
@pytest.mark.parametrize("most", [1 << 16, 1 << 20])
def test_the_messages_are_what_protobuf_would_write(call_id: int, most: int) -> None:
    plane = ReplyPlane(Reader(ReplyBudget(1 << 20)), 1 << 20, call_id)
    reply = filled(plane)
    pieces = [b"".join(piece) for piece in plane.pieces(most)]
    first = pb.StepStreamResponse(
        call_id=call_id, pieces_bytes=plane.pieces_bytes, piece=pieces[0], step=reply
    ).SerializeToString()
    others = [pb.StepStreamResponse(call_id=call_id, piece=piece).SerializeToString() for piece in pieces[1:]]
    assert list(answer_frames(call_id, reply, plane, most)) == [first, *others]


@pytest.mark.parametrize("tensors", [[], TENSORS])
def test_a_caller_that_takes_no_pieces_gets_one_message(tensors: list[torch.Tensor]) -> None:
    plane = ReplyPlane(Reader(ReplyBudget(1 << 20)), 1 << 20)
    reply = filled(plane, tensors)
    whole = pb.StepStreamResponse(call_id=3, step=reply).SerializeToString()
    assert list(answer_frames(3, reply, plane, 0)) == [whole]
    assert [array.tensor.data for array in reply.hits.arrays] == [bytes_of(tensor) for tensor in tensors]
