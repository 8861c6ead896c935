"""A session whose memory's disk is full for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model_client import MemoryClient, Retrieval, errors
from tests.fakes import FakeDisk
from tests.serving import on_disk, serving

DATA = Path("/data")


def test_a_session_goes_on_once_there_is_room_and_has_no_row_twice() -> None:
    disk = FakeDisk()
    with serving(on_disk(DATA, disk)) as server, MemoryClient(server.target) as client:
        client.create_memory("m", dim=1, capacity=16, dtype=torch.float32, durability="always")
        session = client.session("m", ["a"])
        rows = torch.arange(8.0).view(8, 1)
        session.append(rows[:2], [2])
        disk.is_full = True
        with pytest.raises(errors.ReadOnly, match="No space"):
            session.append(rows[2:4], [2])
        found = session.retrieve(rows[:1], [1], Retrieval(top_k=16, arrays=("key",)))
        assert found.hits.rows["key"].flatten().tolist() == [0.0, 1.0]
        disk.is_full = False
        session.append(rows[4:6], [2])
        found = session.retrieve(rows[:1], [1], Retrieval(top_k=16, arrays=("key",)))
        kept = found.hits.rows["key"].flatten().tolist()
        assert kept in ([0.0, 1.0, 4.0, 5.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
