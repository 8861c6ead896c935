"""The server as a process: start, restart, one owner of its data, and its stop."""

from __future__ import annotations

import json
import queue
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from memstore.config import Config
from memstore.errors import NotReady
from memstore.server import Server
from memstore.v1 import memstore_pb2 as pb
from tests.calling import awaiting_next, failure, hashed
from tests.fakes import FakeDisk
from tests.processes import Process
from tests.serving import spec, step

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.timeout(180)  # each start of a process imports torch, which takes seconds on a busy machine


def test_a_server_stops_in_order_and_comes_back_with_its_memories(tmp_path: Path, started: list[Process]) -> None:
    ready, socket = tmp_path / "ready.json", tmp_path / "s"
    where = ("--unix-socket", str(socket), "--ready-file", str(ready))
    first = Process(tmp_path, *where, "--grace", "120")  # whatever else the machine does, nothing is cut off
    started.append(first)
    stub = first.connect()
    announced = json.loads(ready.read_text())
    assert announced["address"] == f"unix://{socket}"
    assert announced["metrics"].startswith("http://127.0.0.1:")
    stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))

    other = Process(tmp_path, "--port", "0")  # the same data
    started.append(other)
    code, log = other.end()
    assert code == 1
    assert "another server holds this lock" in log

    outgoing: queue.Queue[pb.StepStreamRequest] = queue.Queue()
    stream = stub.StepStream(iter(outgoing.get, None))
    outgoing.put(pb.StepStreamRequest(call_id=1, step=step()))
    epoch = next(stream).step.sequences[0].epoch
    assert first.channel is not None
    watch = health_pb2_grpc.HealthStub(first.channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    with awaiting_next(watch) as last_word:
        first.tell(signal.SIGTERM)
        assert last_word.result().status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert isinstance(failure(caught.value), NotReady)
    code, log = first.end()
    assert code == 0
    assert [json.loads(line)["event"] for line in log.splitlines()][-2:] == ["draining", "stopped"]
    assert not socket.exists()
    assert not ready.exists()

    again = Process(tmp_path, *where)
    started.append(again)
    stub = again.connect()
    (memory,) = stub.ListMemories(pb.ListMemoriesRequest()).memories
    assert (memory.spec.name, memory.status.num_rows) == ("notes", 0)
    assert stub.Step(step()).sequences[0].epoch != epoch


def test_a_killed_server_leaves_nothing_in_the_way_of_the_next(tmp_path: Path, started: list[Process]) -> None:
    where = ("--unix-socket", str(tmp_path / "s"), "--ready-file", str(tmp_path / "ready.json"))
    first = Process(tmp_path, *where)
    started.append(first)
    first.connect().CreateMemory(pb.CreateMemoryRequest(spec=spec()))
    first.tell(signal.SIGKILL)
    first.end()
    assert (tmp_path / "s").exists()
    assert (tmp_path / "ready.json").exists()
    second = Process(tmp_path, *where)
    started.append(second)
    assert len(second.connect().ListMemories(pb.ListMemoriesRequest()).memories) == 1


def test_a_second_signal_does_not_wait_for_the_grace(tmp_path: Path, started: list[Process]) -> None:
    server = Process(tmp_path, "--port", "0", "--grace", "3600")
    started.append(server)
    server.connect()
    assert server.channel is not None
    questions: queue.Queue[reflection_pb2.ServerReflectionRequest] = queue.Queue()
    questions.put(reflection_pb2.ServerReflectionRequest(list_services=""))
    talk = reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo(iter(questions.get, None))
    next(talk)  # and it stays open
    server.tell(signal.SIGINT)
    server.until("draining")
    server.tell(signal.SIGTERM)
    code, log = server.end()
    assert code == 0
    assert json.loads(log.splitlines()[-1])["event"] == "stopped"


def test_a_spoilt_catalogue_stops_the_start(tmp_path: Path, started: list[Process]) -> None:
    (tmp_path / "catalog.json").write_text("{}")
    server = Process(tmp_path, "--port", "0")
    started.append(server)
    code, log = server.end()
    assert code == 1
    assert "catalog.json: not a catalogue" in log


def test_a_token_file_that_is_not_taken_is_seen_in_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memstore.auth.FOLLOW_S", 0.0)
    path = tmp_path / "tokens"
    path.write_text(f"{hashed('t', 'red')}\n")
    with ExitStack() as stack:
        server = Server(Config(token_file=path, catalog="none"), stack, FakeDisk())

        def shown() -> float | None:
            return server._metrics.registry.get_sample_value("memstore_file_not_taken", {"file": "tokens"})

        assert shown() == 0
        path.write_text(hashed("t", "red"))
        assert shown() == 1
        path.write_text(f"{hashed('u', 'red')}\n")
        assert shown() == 0


def test_without_its_checks_it_does_not_start(tmp_path: Path, started: list[Process]) -> None:
    server = Process(tmp_path, optimised=True)
    started.append(server)
    code, log = server.end()
    assert code == 2
    assert "python -O" in log
