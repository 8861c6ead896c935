"""Embedded: the server's own service in this process, with tensors handed over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from memstore.config import ConfigError
from memstore.embedded import Embedded
from memstore.errors import Expired, InvalidRequest, MemstoreError, NotFound, NotReady
from memstore.v1 import memstore_pb2 as pb
from tests.bad_requests import OTHERS
from tests.calling import method_of
from tests.serving import spec, step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message


@pytest.fixture
def embedded() -> Iterator[Embedded]:
    """A server in this process with one memory; every tensor that went in was read or let go of."""
    made = Embedded(capacity_bytes=1 << 20)
    made.call("CreateMemory", pb.CreateMemoryRequest(spec=spec())).result()
    yield made
    made.close()
    assert len(made.plane) == 0


def own_step(embedded: Embedded, values: torch.Tensor, **changes: object) -> pb.StepRequest:
    """A step whose keys travel by region."""
    return step(rows=values.shape[1], keys=embedded.plane.write(values), **changes)  # type: ignore[arg-type]


def test_rows_are_found_again(embedded: Embedded) -> None:
    rows = torch.randn(1, 3, 4)
    embedded.call("Step", own_step(embedded, rows, retrieve=None)).result()
    reply = embedded.call("Step", own_step(embedded, rows, seq=1)).result()
    assert isinstance(reply, pb.StepResponse)
    found = embedded.plane.read(reply.hits.arrays[0].tensor, "key")
    index = embedded.plane.read(reply.hits.index, "index")
    assert torch.equal(found[index[0, :, 0, 0].long()], rows[0])
    embedded.plane.discard(reply)


def test_rows_may_enter_the_callers_graph(embedded: Embedded) -> None:
    embedded.call("Step", own_step(embedded, torch.randn(1, 3, 4), retrieve=None)).result()
    reply = embedded.call("Step", own_step(embedded, torch.randn(1, 1, 4), seq=1)).result()
    assert isinstance(reply, pb.StepResponse)
    weight = torch.ones(2, 4, requires_grad=True)
    torch.nn.functional.linear(embedded.plane.read(reply.hits.arrays[0].tensor, "key"), weight).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    embedded.plane.discard(reply)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"memory": "none"}, NotFound),
        ({"layers": [3]}, InvalidRequest),
        ({"writer": "w" * 65}, InvalidRequest),
        ({"seq": 9}, MemstoreError),
    ],
)
def test_a_failed_request_keeps_no_tensor(
    embedded: Embedded, changes: dict[str, object], kind: type[MemstoreError]
) -> None:
    with pytest.raises(kind):
        embedded.call("Step", own_step(embedded, torch.zeros(1, 1, 4), **changes)).result()
    assert len(embedded.plane) == 0


def test_late_requests_are_not_begun(embedded: Embedded) -> None:
    with pytest.raises(Expired):
        embedded.call("Step", own_step(embedded, torch.zeros(1, 1, 4)), timeout_s=0.0).result()
    assert len(embedded.plane) == 0
    described = embedded.call("DescribeMemory", pb.DescribeMemoryRequest(name="notes"), timeout_s=60.0).result()
    assert isinstance(described, pb.DescribeMemoryResponse)
    assert described.memory.status.appended_rows == 0


@pytest.mark.parametrize(("request_", "field"), [row[1:] for row in OTHERS], ids=[row[0] for row in OTHERS])
def test_bad_input_is_refused_as_over_a_network(embedded: Embedded, request_: Message, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        embedded.call(method_of(request_), request_).result()
    assert caught.value.metadata == {"field": field}


def test_it_says_what_it_is(embedded: Embedded) -> None:
    info = embedded.call("ServerInfo", pb.ServerInfoRequest()).result()
    assert isinstance(info, pb.ServerInfoResponse)
    assert list(info.planes) == [pb.PLANE_PROCESS]
    assert (info.device, info.capacity_bytes) == ("cpu", 1 << 20)
    assert 0 < info.reserved_bytes < 1 << 20


def test_after_closing_nothing_is_taken() -> None:
    embedded = Embedded(capacity_bytes=1 << 20)
    embedded.call("CreateMemory", pb.CreateMemoryRequest(spec=spec())).result()
    embedded.close()
    embedded.close()
    with pytest.raises(NotReady):
        embedded.call("Step", own_step(embedded, torch.zeros(1, 1, 4))).result()
    assert len(embedded.plane) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_a_device_that_is_not_here_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="--device=cuda"):
        Embedded("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_needs_no_number() -> None:
    embedded = Embedded("cuda")
    try:
        assert embedded.call("ServerInfo", pb.ServerInfoRequest()).result(20).device == "cuda:0"
    finally:
        embedded.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_that_a_gpu_is_still_making_reach_the_host_whole(embedded: Embedded) -> None:
    rows = torch.zeros(1, 8, 4, device="cuda")
    for seq in range(8):
        torch.cuda._sleep(20_000_000)
        rows = rows + 1
        embedded.call("Step", own_step(embedded, rows, seq=seq, retrieve=None)).result(20)
        asked = own_step(embedded, torch.full((1, 1, 4), seq + 1.0), append=False)
        reply = embedded.call("Step", asked).result(20)
        assert isinstance(reply, pb.StepResponse)
        found = embedded.plane.read(reply.hits.arrays[0].tensor, "key")
        assert found.unique().tolist() == [seq + 1]
        embedded.plane.discard(reply)
