"""A device without working memory refuses the call that needs some, and nothing that it has comes to harm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from memstore.errors import DeviceMemoryFull
from memstore.v1 import memstore_pb2 as pb
from tests.calling import fails
from tests.serving import Setting, serving, spec, tensor
from tests.starving import starved

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serving import Serving

WIDTH = {"cpu": 32, "cuda": 1024}
ROWS = {"cpu": 2048, "cuda": 8192}
"""Of one step: on a GPU 32 MiB, more than what a block of the allocator may have left over."""
DESCRIBE = pb.DescribeMemoryRequest(name="notes")


@pytest.fixture
def server(device: torch.device) -> Iterator[Serving]:
    """A server of that device with a memory."""
    with serving(Setting(device=device.type, capacity_bytes=4 << 30)) as made:
        large = spec(dim=WIDTH[device.type], capacity=ROWS[device.type], max_sequences=3)
        made.stub.CreateMemory(pb.CreateMemoryRequest(spec=large))
        yield made


def keys(device: torch.device, seed: int) -> torch.Tensor:
    """Rows of one sequence, none of them like another."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, ROWS[device.type], WIDTH[device.type], generator=generator)


def appending(name: str, rows: torch.Tensor, seq: int = 0) -> pb.StepRequest:
    """A step that retrieves for each of these rows and appends them."""
    part = pb.SequencePart(sequence=name, num_rows=rows.shape[1], seq=seq)
    retrieve = pb.RetrieveOptions(top_k=1)
    return pb.StepRequest(
        memory="notes", sequences=[part], retrieve=retrieve, append=True, writer="w", keys=tensor(rows)
    )


def found(server: Serving, name: str, rows: torch.Tensor) -> pb.StepResponse:
    """What is nearest to some of these rows, which are the rows themselves where they are there."""
    some = rows[:, :: rows.shape[1] // 8].contiguous()
    part = pb.SequencePart(sequence=name, num_rows=some.shape[1])
    retrieve = pb.RetrieveOptions(top_k=1, arrays=["key"])
    reply: pb.StepResponse = server.stub.Step(
        pb.StepRequest(memory="notes", sequences=[part], retrieve=retrieve, keys=tensor(some))
    )
    return reply


@pytest.mark.timeout(120)
def test_what_finds_no_working_memory_is_refused_and_harms_nothing(server: Serving, device: torch.device) -> None:
    first, second = keys(device, 1), keys(device, 2)
    server.stub.Step(appending("a", first))
    server.stub.Step(appending("warm", second))  # kernels are loaded
    server.stub.Reset(pb.ResetRequest(memory="notes", sequences=["warm"], release=True))
    before, described = found(server, "a", first), server.stub.DescribeMemory(DESCRIBE)
    refused = appending("b", second)
    with starved(server.registry.worker):
        for _ in range(2):
            assert isinstance(fails(server, "Step", refused), DeviceMemoryFull)
        assert server.stub.DescribeMemory(DESCRIBE) == described
    assert not server.registry.worker.is_sick
    assert server.registry.worker.admission.num_requests == 0
    assert found(server, "a", first) == before
    assert server.stub.Step(refused).sequences[0].first_position == 0
    for name, rows in (("a", first), ("b", second)):
        hits = found(server, name, rows).hits
        content = torch.frombuffer(bytearray(hits.arrays[0].tensor.data), dtype=torch.float32)
        some = rows[0, :: rows.shape[1] // 8]
        assert torch.equal(content.view_as(some), some)
