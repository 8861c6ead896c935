"""Metrics: what is counted is shown, on a port that has nothing else."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest

from memstore.grpc_front import SERVICE
from memstore.metrics import Metrics, MetricsServer
from memstore.v1 import memstore_pb2 as pb
from tests.calling import Conversation, fails
from tests.fakes import held
from tests.serving import spec, step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serving import Serving


@pytest.fixture
def port(server: Serving) -> Iterator[int]:
    """The metrics of `server` on a port of their own."""
    made = MetricsServer(("127.0.0.1", 0), server.metrics, lambda: server.health.is_serving)
    yield made.port
    made.close()


def get(port: int, path: str) -> tuple[int, str]:
    """Status and text of a page."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_what_happened_is_shown(server: Serving, port: int) -> None:
    for seq in range(3):
        server.stub.Step(step(rows=4, seq=seq))
    fails(server, "Step", step(seq=9))
    code, text = get(port, "/metrics")
    assert code == 200
    for line in (
        'memstore_rpc_server_duration_seconds_count{code="OK",method="Step"} 3.0',
        'memstore_rpc_server_duration_seconds_count{code="FAILED_PRECONDITION",method="Step"} 1.0',
        'memstore_rpc_server_duration_seconds_count{code="OK",method="Fork"} 0.0',
        'memstore_memory_rows{memory="notes"} 8.0',
        'memstore_memory_capacity_rows{memory="notes"} 32.0',
        'memstore_appended_rows_total{memory="notes"} 12.0',
        'memstore_evicted_rows_total{memory="notes",reason="fifo"} 4.0',
        'memstore_step_rows_total{memory="notes"} 13.0',
        "memstore_queue_depth 0.0",
        "memstore_capacity_bytes 1.073741824e+09",
        'memstore_build_info{version="0.1.0"} 1.0',
    ):
        assert line in text.splitlines(), line


def test_generations_are_shown(server: Serving, port: int) -> None:
    pytest.importorskip("faiss")
    settings = pb.IndexSettings(generation_rows=16, nlist=2)
    large = spec("large", capacity=64, index=pb.INDEX_KIND_FAISS_IVF_FLAT, index_settings=settings)
    server.stub.CreateMemory(pb.CreateMemoryRequest(spec=large))
    server.stub.Step(step(memory="large", rows=20))
    describe = pb.DescribeMemoryRequest(name="large")
    while server.stub.DescribeMemory(describe).memory.status.index.builds_under_way:
        pass
    status = server.stub.DescribeMemory(describe).memory.status.index
    assert (status.num_generations, status.builds_done, status.tail_rows) == (1, 1, 4)
    assert status.build_seconds > 0
    lines = get(port, "/metrics")[1].splitlines()
    for line in (
        'memstore_index_generations{memory="large"} 1.0',
        'memstore_index_tail_rows{memory="large"} 4.0',
        'memstore_index_builds_under_way{memory="large"} 0.0',
        'memstore_index_builds_done_total{memory="large"} 1.0',
        'memstore_index_builds_put_off_total{memory="large"} 0.0',
        f'memstore_index_build_seconds_total{{memory="large"}} {status.build_seconds!r}',
    ):
        assert line in lines, line
    assert 'memstore_index_generations{memory="notes"} 0.0' not in lines
    server.stub.DropMemory(pb.DropMemoryRequest(name="large"))


def test_streams_are_counted_while_they_are_open(server: Serving) -> None:
    talk = Conversation(server)
    talk.say(1, step())
    talk.hear()
    registry = server.metrics.registry
    assert registry.get_sample_value("memstore_sessions") == 1
    talk.end()
    assert list(talk.answers) == []
    count = registry.get_sample_value(
        "memstore_rpc_server_duration_seconds_count", {"method": "StepStream", "code": "OK"}
    )
    assert count == 1


def test_probes_tell_life_from_readiness(server: Serving, port: int) -> None:
    assert get(port, "/livez") == (200, "alive\n")
    assert get(port, "/readyz") == (200, "ready\n")
    server.drain()
    assert get(port, "/livez") == (200, "alive\n")
    assert get(port, "/readyz") == (503, "not ready\n")


@pytest.mark.parametrize("path", ["/", "/metrics/..", "/memstore.v1.MemoryService/Step", "/debug"])
def test_there_is_nothing_else(port: int, path: str) -> None:
    assert get(port, path)[0] == 404


def test_a_busy_device_does_not_hold_up_a_scrape(server: Serving, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memstore.metrics.SCRAPE_S", 0.01)
    with held(server.registry.worker):
        code, text = get(port, "/metrics")
    assert code == 200
    assert "memstore_queue_depth" in text
    assert "memstore_memory_rows{" not in text


def test_names_of_memories_are_bounded() -> None:
    metrics = Metrics([method.name for method in SERVICE.methods], "0", 2)
    for name in ("a", "b", "c", "d", "a"):
        metrics.joined(name, 1, 10, 0.001)
    rows = {name: metrics.registry.get_sample_value("memstore_step_rows_total", {"memory": name}) for name in "abc"}
    assert rows == {"a": 20, "b": 10, "c": None}
    assert metrics.registry.get_sample_value("memstore_step_rows_total", {"memory": "other"}) == 20
