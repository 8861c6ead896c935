"""Messages of very many parts: found out before they are parsed."""

from __future__ import annotations

import grpc
import pytest

from memstore.errors import InvalidRequest
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import MAX_MESSAGE_PARTS, is_crowd
from memstore.wire.limits import MAX_LAYERS, MAX_PARTS, MAX_PAYLOADS, MAX_SEQUENCE_NAME
from tests.calling import failure
from tests.serving import Setting, serving, spec, step

STEP = pb.StepRequest.DESCRIPTOR
BYTES_BEHIND = b"\x7a\x80\x80\x08" + bytes(1 << 17)
"""A field that nobody knows, so that a message is not small."""
MANY = MAX_MESSAGE_PARTS
LARGEST = 2**63 - 1


def at_every_limit() -> pb.StepRequest:
    """A step with as many parts as one may have."""
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_FP32, shape=[LARGEST] * 5, data=bytes(1 << 20))
    part = pb.SequencePart(num_rows=1, start_of_sequence=True, epoch=LARGEST, seq=LARGEST, as_of=LARGEST)
    names = [f"{number:>{MAX_SEQUENCE_NAME}}" for number in range(MAX_PARTS)]
    parts = [pb.SequencePart(sequence=name) for name in names]
    for each in parts:
        each.MergeFrom(part)
    return pb.StepRequest(
        memory="m",
        sequences=parts,
        retrieve=pb.RetrieveOptions(top_k=1, window_before=1, window_after=1, arrays=["x"] * (MAX_PAYLOADS + 1)),
        append=True,
        writer="w",
        layers=range(MAX_LAYERS),
        keys=tensor,
        payloads=[pb.NamedTensor(name="x", tensor=tensor)] * MAX_PAYLOADS,
    )


def test_what_the_contract_allows_is_no_crowd() -> None:
    request = at_every_limit()
    assert not is_crowd(STEP, request.SerializeToString())
    wrapped = pb.StepStreamRequest(call_id=1, step=request)
    wrapped.timeout.FromSeconds(3)
    assert not is_crowd(pb.StepStreamRequest.DESCRIPTOR, wrapped.SerializeToString())


@pytest.mark.parametrize(
    "content",
    [
        b"\x12\x00" * (MANY + 1),
        pb.StepRequest(retrieve=pb.RetrieveOptions(arrays=[""] * (MANY + 1))).SerializeToString(),
        pb.StepRequest(keys=pb.Tensor(shape=[1] * (64 * (MANY + 1)))).SerializeToString(),
        pb.StepRequest(layers=[1] * (64 * (MANY + 1))).SerializeToString(),
        pb.StepRequest(payloads=[pb.NamedTensor(name="x")] * (MANY // 2 + 1)).SerializeToString(),
        b"\x78\x01" * (MANY + 1),
        b"\x7b\x7c" + b"\x12\x00" * (MANY + 1),
        BYTES_BEHIND[:-1],
        BYTES_BEHIND + b"\x79\x00",
        BYTES_BEHIND + b"\xff" * 5,
        b"\xff" * (1 << 22),
    ],
    ids=[
        "sequences",
        "arrays",
        "shape",
        "layers",
        "payloads",
        "unknown",
        "group",
        "cut",
        "cut-8",
        "cut-key",
        "endless",
    ],
)
def test_too_many_parts_and_what_is_no_message_are_told_from_the_bytes(content: bytes) -> None:
    assert is_crowd(STEP, content)
    assert is_crowd(pb.StepStreamRequest.DESCRIPTOR, _within(content))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _within(content: bytes) -> bytes:
    """The message of a stream with such a step."""
    number = pb.StepStreamRequest.DESCRIPTOR.fields_by_name["step"].number
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def test_a_server_refuses_them_on_every_method_and_on_a_stream() -> None:
    content = b"\x12\x00" * (MANY + 1)
    with serving(Setting()) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))
        for method in ("Step", "Reset", "CreateMemory", "OpenPlane"):
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = server.channel.unary_unary(
                f"/memstore.v1.MemoryService/{method}"
            )
            with pytest.raises(grpc.RpcError, match="65,536 fields at most") as caught:
                call(content, timeout=20)
            assert isinstance(failure(caught.value), InvalidRequest)
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = server.channel.stream_stream(
            "/memstore.v1.MemoryService/StepStream"
        )
        with pytest.raises(grpc.RpcError, match="65,536 fields at most") as caught:
            next(stream(iter([_within(content)]), timeout=20))
        assert isinstance(failure(caught.value), InvalidRequest)
        server.stub.Step(step())
