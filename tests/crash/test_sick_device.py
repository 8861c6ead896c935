"""A failure that only another process can leave behind ends the server, so that its supervisor starts another."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import grpc
import pytest

from memstore.server import SICK
from memstore.v1 import memstore_pb2 as pb
from tests.crash.sick import POISON
from tests.processes import Process
from tests.serving import spec, step

if TYPE_CHECKING:
    from pathlib import Path

    import torch

ASK = step(rows=3, append=False, writer="", retrieve=pb.RetrieveOptions(top_k=4, arrays=["key"]))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("hangs", ["", "1"])
def test_a_failed_device_ends_the_server_within_five_seconds(
    hangs: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next one answers as it did, from what was acknowledged."""
    monkeypatch.setenv("HANGS", hangs)
    where = ("--port", "0", "--device", device.type)
    server = Process(tmp_path, *where, program="tests.crash.sick")
    try:
        stub = server.connect()
        stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=pb.DURABILITY_ALWAYS)))
        for seq in range(3):
            stub.Step(step(rows=4, seq=seq))
        before = stub.Step(ASK)
        began = time.monotonic()
        with pytest.raises(grpc.RpcError):
            stub.Step(step((POISON,)), timeout=10)
        code, _ = server.end()
        assert code == SICK
        assert time.monotonic() - began < 5
    finally:
        server.close()
    again = Process(tmp_path, *where)
    try:
        stub = again.connect()
        assert stub.Step(ASK) == before
        assert stub.Step(step(seq=3)).sequences[0].first_position == 12
        again.tell(signal.SIGTERM)
        assert again.end()[0] == 0
    finally:
        again.close()
