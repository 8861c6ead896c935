"""A failure that only another process can leave behind ends the server, so that its supervisor starts another."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import grpc
import pytest

from memstore.server import SICK
from memstore.v1 import memstore_pb2 as pb
from tests.processes import Process
from tests.serving import spec, step

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.timeout(120)
@pytest.mark.parametrize("hangs", ["", "1"])
def test_a_failed_device_ends_the_server_within_five_seconds(
    hangs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANGS", hangs)
    server = Process(tmp_path, "--port", "0", program="tests.crash.sick")
    try:
        stub = server.connect()
        stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=pb.DURABILITY_ALWAYS)))
        began = time.monotonic()
        with pytest.raises(grpc.RpcError):
            stub.Step(step(), timeout=10)
        code, _ = server.end()
        assert code == SICK
        assert time.monotonic() - began < 5
    finally:
        server.close()
    again = Process(tmp_path, "--port", "0")
    try:
        assert again.connect().Step(step()).sequences[0].first_position == 0
        again.tell(signal.SIGTERM)
    finally:
        again.close()
