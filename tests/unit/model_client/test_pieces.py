"""Answers that come in pieces: put together, read once, and refused where they are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from memstore.v1 import memstore_pb2 as pb
from model_client.errors import Internal
from model_client.transport.pieces import HUGE_BYTES, MAX_ANSWER_BYTES, Answer, Assembly, PiecesPlane

CPU = torch.device("cpu")
ELSEWHERE = torch.device("meta")
"""A device that is not the host, and is everywhere."""


def piece(call_id: int, content: bytes, **fields: object) -> bytes:
    return pb.StepStreamResponse(call_id=call_id, piece=content, **fields).SerializeToString()  # type: ignore[arg-type]


def a_slice(offset: int, length: int, region: int = 5, plane: pb.Plane.ValueType = pb.PLANE_INLINE) -> pb.Tensor:
    where = pb.RegionSlice(plane=plane, region=region, offset_bytes=offset, length_bytes=length)
    return pb.Tensor(dtype=pb.DATA_TYPE_INT32, shape=[length // 4], region=where)


def answer_of(plane: PiecesPlane, values: int = 12) -> pb.StepResponse:
    """A reply with its three tensors in pieces, kept by the plane."""
    step = pb.StepResponse(hits=pb.Hits(row_splits=a_slice(0, 16), positions=a_slice(16, 16), index=a_slice(32, 16)))
    buffer = torch.arange(values, dtype=torch.int32).view(torch.uint8).numpy()
    plane.keep(Answer(pb.StepStreamResponse(call_id=5, step=step), buffer))
    return step


@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=6), st.booleans())
def test_pieces_of_any_length_are_put_together(parts: list[bytes], is_other_order: bool) -> None:
    whole, step = b"".join(parts), pb.StepResponse(sequences=[pb.SequenceResult(epoch=3)])
    messages = [piece(5, parts[0], step=step, pieces_bytes=len(whole)), *(piece(5, each) for each in parts[1:])]
    if is_other_order:  # fields may come in any order, and with some that are not known
        first = pb.StepStreamResponse(call_id=5, step=step, pieces_bytes=len(whole)).SerializeToString()
        messages[0] = first + b"\xa0\x06\x01\xad\x06abcd" + piece(5, parts[0])
    assembly = Assembly()
    answers = [assembly.add(each) for each in messages]
    assert answers[:-1] == [None] * (len(parts) - 1)
    last = answers[-1]
    assert last is not None
    assert last.buffer is not None
    assert last.buffer.tobytes() == whole
    assert (last.message.call_id, last.message.step) == (5, step)


@pytest.mark.parametrize("size", [1, 2 * HUGE_BYTES - 1, 2 * HUGE_BYTES, 3 * HUGE_BYTES + 1])
def test_a_buffer_of_any_size_is_writable(size: int) -> None:
    assembly = Assembly()
    content = bytes([7]) * size
    answer = assembly.add(piece(5, content, pieces_bytes=size))
    assert answer is not None
    assert answer.buffer is not None
    assert answer.buffer.ctypes.data % 16 == 0
    assert int(answer.buffer.sum(dtype=np.int64)) == 7 * size
    answer.buffer.fill(0)


@pytest.mark.parametrize("is_left", [True, False])
def test_with_a_gpu_answers_lie_in_memory_of_its_own_kind(is_left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        if not is_left:
            raise RuntimeError("out of memory")
        made.append(torch.zeros(size, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "empty", empty)
    answer = Assembly().add(piece(5, b"abcd", pieces_bytes=4))
    assert answer is not None and answer.buffer is not None
    assert answer.buffer.tobytes() == b"abcd"
    assert [each.tolist() for each in made] == [list(b"abcd")] * is_left


def test_what_has_no_pieces_is_whole() -> None:
    failure = pb.StepStreamResponse(call_id=1, failure=pb.Failure(code=3))
    answer = Assembly().add(failure.SerializeToString())
    assert answer == Answer(failure, None)


@pytest.mark.parametrize(
    "messages",
    [
        [b"\xff\xff\xff"],
        [b"\x72\x05abc"],
        [b"\x7b"],
        [piece(5, b"abc", pieces_bytes=2)],
        [piece(5, b"abc", pieces_bytes=-1)],
        [piece(5, b"abc", pieces_bytes=MAX_ANSWER_BYTES + 1)],
        [piece(5, b"abc", pieces_bytes=6), piece(6, b"def")],
        [piece(5, b"abc", pieces_bytes=6), piece(5, b"defg")],
        [piece(5, b"abc", pieces_bytes=6), piece(5, b"")],
    ],
)
def test_what_is_no_answer_is_refused(messages: list[bytes]) -> None:
    assembly = Assembly()
    with pytest.raises(DecodeError):
        for each in messages:
            assembly.add(each)


def test_pieces_are_let_go_of_once_all_tensors_are_read() -> None:
    plane = PiecesPlane()
    hits = answer_of(plane).hits
    read = [plane.read(each, CPU) for each in (hits.row_splits, hits.positions, hits.index)]
    assert [each.tolist() for each in read] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(Internal, match="region 5"):
        plane.read(hits.index, CPU)


def test_an_answer_that_nobody_reads_is_let_go_of() -> None:
    plane = PiecesPlane()
    step = answer_of(plane)
    plane.discard(step)
    plane.discard(pb.ResetResponse())
    with pytest.raises(Internal):
        plane.read(step.hits.index, CPU)


@pytest.mark.parametrize(
    "bad", [a_slice(40, 16), a_slice(-4, 16), a_slice(0, 18), a_slice(0, 16, plane=pb.PLANE_SHM), a_slice(0, 16, 6)]
)
@pytest.mark.parametrize("device", [CPU, ELSEWHERE], ids=str)
def test_a_slice_of_something_else_is_internal(bad: pb.Tensor, device: torch.device) -> None:
    plane = PiecesPlane()
    answer_of(plane)
    with pytest.raises(Internal):
        plane.read(bad, device)


def test_an_answer_crosses_to_another_device_once() -> None:
    plane = PiecesPlane()
    hits = answer_of(plane).hits
    read = [plane.read(each, ELSEWHERE) for each in (hits.row_splits, hits.positions, hits.index)]
    assert [(each.dtype, each.shape, each.device) for each in read] == [(torch.int32, (4,), ELSEWHERE)] * 3
    assert [each.storage_offset() for each in read] == [0, 4, 8]
    assert {each.untyped_storage().nbytes() for each in read} == {48}


def test_a_slice_between_elements_stays_on_the_host() -> None:
    plane = PiecesPlane()
    answer_of(plane)
    assert plane.read(a_slice(2, 8), CPU).shape == (2,)
    with pytest.raises(Internal, match="between its elements"):
        plane.read(a_slice(2, 8), ELSEWHERE)
