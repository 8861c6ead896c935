"""Two tenants who both want all of a device: each has its share of the time, however much more the other asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from memstore.admission import QueueLimits
from memstore.turns import Turns
from memstore.v1 import memstore_pb2 as pb
from tests.calling import bearer, hashed, tokens
from tests.saturating import Saturation
from tests.serving import Setting, serving, spec, tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serving import Serving

DIM, ROWS = 64, 4096
TENANTS = {"modest": (1, 6), "greedy": (64, 64)}
"""Queries of each request, and how many of them there are at any time."""
SHARE = 0.8


@pytest.fixture
def server(device: torch.device) -> Iterator[Serving]:
    """A server of that device on which each tenant has a memory full of rows."""
    known = tokens(*(hashed(tenant, tenant) for tenant in TENANTS))
    setting = Setting(authenticator=known, limits=QueueLimits(leaves_room=True), device=device.type)
    with serving(setting) as made:
        rows = tensor(torch.randn(1, ROWS, DIM))
        part = pb.SequencePart(sequence="a", num_rows=ROWS)
        for tenant in TENANTS:
            create = pb.CreateMemoryRequest(spec=spec(dim=DIM, capacity=ROWS))
            made.stub.CreateMemory(create, metadata=bearer(tenant))
            append = pb.AppendRequest(memory="notes", sequences=[part], keys=rows)
            made.stub.Append(append, metadata=bearer(tenant))
        yield made


def saturation(server: Serving) -> Saturation:
    """Both tenants at once."""
    asked = {
        tenant: (
            pb.RetrieveRequest(
                memory="notes",
                sequences=[pb.SequencePart(sequence="a", num_rows=num_rows)],
                retrieve=pb.RetrieveOptions(top_k=4),
                keys=tensor(torch.randn(1, num_rows, DIM)),
            ),
            number,
        )
        for tenant, (num_rows, number) in TENANTS.items()
    }
    return Saturation(server.front._service, asked)


@pytest.mark.timeout(120)
def test_two_tenants_that_saturate_a_device_each_have_their_share_of_it(server: Serving) -> None:
    shares = saturation(server).run()
    assert min(shares.values()) >= SHARE, shares


@pytest.mark.timeout(120)
def test_without_turns_the_greedy_one_would_have_nearly_all(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above can fail: whoever has most waiting is next."""
    turns = server.registry.worker._turns

    def busiest(_: Turns[object]) -> object:
        """Which that is."""
        return max(turns._lanes.values(), key=lambda lane: len(lane.jobs))

    monkeypatch.setattr(Turns, "_next", busiest)
    assert min(saturation(server).run().values()) < SHARE
