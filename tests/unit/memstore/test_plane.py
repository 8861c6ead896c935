"""Planes: a tensor arrives as it was sent, without a copy where the plane promises none."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest
import torch

from memstore.errors import InvalidRequest
from memstore.plane import DATA_TYPES, InlinePlane, ProcessPlane, in_one_piece, tensor_bytes, tensors_of
from memstore.v1 import memstore_pb2 as pb
from tests.serving import step

if TYPE_CHECKING:
    from memstore.plane import Plane

PLANES = [InlinePlane(1 << 20), ProcessPlane()]
VALUES = {
    "a row": torch.tensor([[1.0, -2.0, 3.0]]),
    "nothing": torch.zeros(2, 0, 3),
    "a number": torch.tensor(5.0),
    "a transposed view": torch.arange(6.0).reshape(2, 3).T,
    "every other row": torch.arange(12.0).reshape(4, 3)[::2],
}


@pytest.mark.parametrize("plane", PLANES, ids=["inline", "process"])
@pytest.mark.parametrize("dtype", DATA_TYPES, ids=str)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_a_tensor_arrives_as_it_was_sent(plane: Plane, dtype: torch.dtype, value: torch.Tensor) -> None:
    sent = value.to(dtype)
    message = pb.Tensor.FromString(plane.write(sent).SerializeToString())
    got = plane.read(message, "keys")
    assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
    assert torch.equal(got, sent)


def test_reading_does_not_copy_and_does_not_warn() -> None:
    message = pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=[3], data=b"abc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = InlinePlane(64).read(message, "keys")
    assert first.tolist() == list(b"abc")
    assert first.untyped_storage().nbytes() == 3


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.Tensor(shape=[1], data=b"a"), "keys.dtype"),
        (pb.Tensor(dtype=42, shape=[1], data=b"a"), "keys.dtype"),  # type: ignore[arg-type]
        (pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=[1] * 9, data=b"a"), "keys.shape"),
        (pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=[-1], data=b"a"), "keys.shape"),
        (pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=[-1, -1], data=b"a"), "keys.shape"),
        (pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=[2], data=b"a"), "keys.data"),
        (pb.Tensor(dtype=pb.DATA_TYPE_FP32, shape=[1], data=b"abc"), "keys.data"),
        (pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=[1 << 62, 1 << 62], data=b"a"), "keys.data"),
        (pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=[1 << 40, 1 << 40, 0], data=b""), "keys.shape"),
        (pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=[0]), "keys.data"),
        (pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=[1], region=pb.RegionSlice(region=1)), "keys.data"),
    ],
)
def test_inline_refuses_what_is_not_a_tensor(message: pb.Tensor, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        InlinePlane(64).read(message, "keys")
    assert caught.value.metadata == {"field": field}


def test_within_a_process_the_tensor_itself_is_handed_over_once() -> None:
    plane = ProcessPlane()
    sent = torch.ones(2, 3)
    message = plane.write(sent)
    assert len(plane) == 1
    assert plane.read(message, "keys").data_ptr() == sent.data_ptr()
    assert len(plane) == 0
    with pytest.raises(InvalidRequest, match="read once"):
        plane.read(message, "keys")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [3]},
        {"dtype": pb.DATA_TYPE_INT8},
        {"region": pb.RegionSlice(region=99)},
        {"region": pb.RegionSlice(plane=pb.PLANE_CUDA)},
        {"data": b""},
    ],
    ids=["shape", "dtype", "number", "plane", "inline"],
)
def test_within_a_process_a_message_must_fit_its_region(change: dict[str, object]) -> None:
    plane = ProcessPlane()
    message = plane.write(torch.ones(2))
    message.MergeFrom(pb.Tensor(**change))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest):
        plane.read(message, "keys")


def test_what_nobody_reads_can_be_let_go_of() -> None:
    plane = ProcessPlane()
    request = step(keys=plane.write(torch.ones(1, 1, 4)))
    request.payloads.add(name="hidden").tensor.CopyFrom(plane.write(torch.ones(1, 1, 2)))
    kept = plane.write(torch.ones(1))
    plane.discard(pb.StepStreamRequest(step=request))
    assert len(plane) == 1
    plane.read(kept, "kept")
    plane.discard(request)  # may come again


def test_handing_over_leaves_the_writers_graph_behind() -> None:
    plane = ProcessPlane()
    sent = torch.ones(2, requires_grad=True) * 2
    assert not plane.read(plane.write(sent), "keys").requires_grad


def test_every_tensor_of_a_message_is_found_and_counts() -> None:
    plane = ProcessPlane()
    request = step(keys=plane.write(torch.ones(1, 1, 4)))
    small = tensor_bytes(request)
    request.payloads.add(name="a").tensor.data = bytes(1000)
    request.payloads.add(name="b")  # has none
    assert len(list(tensors_of(request))) == 2
    assert small + 1000 <= tensor_bytes(request) < small + 1100
    assert tensor_bytes(request) == request.ByteSize() + 16
    response = pb.StepStreamResponse(step=pb.StepResponse(hits=pb.Hits(positions=pb.Tensor(), scores=pb.Tensor())))
    assert len(list(tensors_of(response))) == 2
    assert list(tensors_of(pb.CreateMemoryRequest(spec=pb.MemorySpec(tags={"a": "b"})))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("plane", PLANES, ids=["inline", "process"])
def test_on_a_device_the_reader_sees_what_the_writers_stream_will_have_written(plane: Plane) -> None:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        value = torch.zeros(1 << 22, device="cuda")
        for _ in range(50):
            value += 1
        first, second = pb.Tensor(), pb.Tensor()
        plane.fill([first, second], [value, torch.arange(3, device="cuda")])
    assert plane.read(first, "value").min().item() == 50
    assert plane.read(second, "more").tolist() == [0, 1, 2]


ROOM = torch.arange(4096, dtype=torch.int64).view(torch.uint8)
PIECES = {
    "views of one piece": [ROOM[256:320].view(torch.float32), ROOM[512:640].view(torch.int64).view(2, 8), ROOM[:0]],
    "a piece that does not begin at a line": [ROOM[264:280].view(torch.int64), ROOM[300:333]],
    "views with much between them": [ROOM[:8], ROOM[30_000:30_100]],
    "a view that is not contiguous": [ROOM.view(torch.int32)[::2], ROOM[:8]],
    "pieces of their own": [torch.arange(5), torch.ones(3, 2, dtype=torch.bfloat16), torch.empty(0, 4)],
    "nothing": [torch.empty(0), torch.empty(2, 0, dtype=torch.int64)],
}


@pytest.mark.parametrize("tensors", PIECES.values(), ids=PIECES.keys())
def test_tensors_cross_in_one_piece(tensors: list[torch.Tensor]) -> None:
    made: list[torch.Tensor] = []

    def make(size: int) -> torch.Tensor:
        made.append(torch.full((size,), 7, dtype=torch.uint8))
        return made[-1]

    copies = in_one_piece(tensors, make)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(copy, tensor)
        assert copy.untyped_storage().data_ptr() == made[0].untyped_storage().data_ptr()
    assert len(made) == 1
    assert made[0].nbytes <= 2 * sum(tensor.nbytes for tensor in tensors) + 64 * len(tensors)
