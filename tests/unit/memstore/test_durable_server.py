"""Durable memories in a server that is killed, stopped, and started over damaged files."""

from __future__ import annotations

import json
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from memstore.auth import DEFAULT_TENANT
from memstore.catalog import FileCatalog
from memstore.errors import (
    AlreadyExists,
    Corrupt,
    InvalidRequest,
    NotReady,
    QuotaExceeded,
)
from memstore.plane import InlinePlane
from memstore.service import Caller
from memstore.store import FileStore, Syncers, disk_bytes
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import decode_spec
from tests.calling import fails, failure
from tests.fakes import Diligent, FakeClock, FakeDisk
from tests.processes import Process
from tests.serving import Setting, Unwatched, on_disk, serving, spec, step

if TYPE_CHECKING:
    from memstore.v1.memstore_pb2_grpc import MemoryServiceStub

DATA = Path("/data")
ALWAYS, INTERVAL = pb.DURABILITY_ALWAYS, pb.DURABILITY_INTERVAL


def _ask(stub: MemoryServiceStub, memory: str) -> bytes:
    """An answer to one question, byte for byte."""
    request = step(("a", "b"), rows=2, memory=memory, append=False, writer="")
    return stub.Step(request).SerializeToString(deterministic=True)


@pytest.mark.timeout(180)
def test_a_killed_server_comes_back_with_every_acknowledged_row(tmp_path: Path, started: list[Process]) -> None:
    started.append(Process(tmp_path, "--port", "0"))
    stub = started[0].connect()
    answers = {}
    for name, durability in (("always", ALWAYS), ("interval", INTERVAL), ("volatile", pb.DURABILITY_VOLATILE)):
        made = stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(name, durability=durability)))
        assert made.memory.spec.durability == durability
        for seq in range(5):
            reply = stub.Step(step(("a", "b"), rows=3, seq=seq, memory=name))
            assert {each.durability for each in reply.sequences} == {durability}
        answers[name] = _ask(stub, name)
    started[0].tell(signal.SIGKILL)
    started[0].end()
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path

    started.append(Process(tmp_path, "--port", "0"))
    stub = started[1].connect()
    for name in ("always", "interval"):
        assert _ask(stub, name) == answers[name]
        resent = stub.Step(step(("a", "b"), rows=3, seq=4, memory=name)).sequences
        assert [(each.is_replay, each.first_position) for each in resent] == [(True, 12)] * 2
    assert _ask(stub, "volatile") != answers["volatile"]
    started[1].tell(signal.SIGTERM)
    code, log = started[1].end()
    assert code == 0
    assert [json.loads(line)["event"] for line in log.splitlines()].count("snapshot taken") == 2

    started.append(Process(tmp_path, "--port", "0"))
    stub = started[2].connect()
    for name in ("always", "interval"):
        assert _ask(stub, name) == answers[name]


@pytest.mark.timeout(180)
def test_a_damaged_memory_is_data_loss_and_the_others_serve(tmp_path: Path, started: list[Process]) -> None:
    started.append(Process(tmp_path, "--port", "0"))
    stub = started[0].connect()
    for name in ("broken", "whole"):
        stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(name, durability=ALWAYS)))
        stub.Step(step(memory=name))
        stub.Step(step(memory=name, seq=1))
    started[0].tell(signal.SIGKILL)
    started[0].end()
    path = tmp_path / "memories" / "default" / "broken" / "log-00000001"
    content = bytearray(path.read_bytes())
    content[-200] ^= 4
    path.write_bytes(content)

    started.append(Process(tmp_path, "--port", "0"))
    stub = started[1].connect()
    assert stub.Step(step(memory="whole", seq=2)).sequences[0].first_position == 2
    for call in (
        lambda: stub.Step(step(memory="broken", seq=2)),
        lambda: stub.DescribeMemory(pb.DescribeMemoryRequest(name="broken")),
        lambda: stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("broken"))),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert isinstance(failure(caught.value), Corrupt)
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    assert path.read_bytes() == content
    stub.DropMemory(pb.DropMemoryRequest(name="broken"))
    assert not path.exists()
    stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("broken", durability=ALWAYS)))
    assert stub.Step(step(memory="broken")).sequences[0].first_position == 0


def test_a_memory_that_is_made_again_has_nothing_of_the_one_before() -> None:
    disk = FakeDisk()
    with serving(on_disk(DATA, disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        epoch = server.stub.Step(step()).sequences[0].epoch
        server.stub.DropMemory(pb.DropMemoryRequest(name="notes"))
        assert [path for path in disk.files if "memories" in path.parts] == []
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        again = server.stub.Step(step()).sequences[0]
        assert (again.first_position, again.is_replay) == (0, False)
        assert again.epoch != epoch


def test_what_a_crash_left_of_a_dropped_memory_does_not_come_back() -> None:
    disk = FakeDisk()
    with serving(on_disk(DATA, disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        server.stub.Step(step())
        left = dict(disk.files)
        server.stub.DropMemory(pb.DropMemoryRequest(name="notes"))
    disk.files.update({path: content for path, content in left.items() if "memories" in path.parts})
    with serving(on_disk(DATA, disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        assert not server.stub.Step(step()).sequences[0].is_replay


def test_names_of_tenants_and_memories_never_leave_their_folder(tmp_path: Path) -> None:
    from memstore.folder import path_of

    for name in ("..", ".", "a/b", "../../x", "a\0b", "ä", "%2e", "A" * 128):
        path = path_of(tmp_path, name, name)
        assert path.parent.parent == tmp_path / "memories"
        assert path.resolve() == path
        assert all(part.isascii() and "/" not in part for part in path.parts[-2:])
    assert len({path_of(tmp_path, name, "m") for name in ("..", "%2E.", ".%2E", "%2e.")}) == 4


@pytest.mark.parametrize("has_failed", [False, True])
def test_what_is_told_of_a_memory_is_synced_first_or_never_can_be(has_failed: bool) -> None:
    disk, syncer = FakeDisk(), Diligent(waits=True)
    store = FileStore(DATA, disk, FakeClock(), 0, Unwatched(), Syncers(syncer, syncer))
    with serving(Setting(catalog=FileCatalog(DATA, disk), store=store)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("beside")))
        service, caller = server.front._service, Caller(tenant=DEFAULT_TENANT, plane=InlinePlane(1 << 20))
        appended = service.call("Step", step(retrieve=None), caller)
        described = service.call("DescribeMemory", pb.DescribeMemoryRequest(name="notes"), caller)
        listed = service.call("ListMemories", pb.ListMemoriesRequest(), caller)
        server.registry._errands.submit(lambda: None).result()
        server.registry.worker.control(lambda: None, behind=DEFAULT_TENANT).result()  # all three have been done
        assert not any(each.done() for each in (appended, described, listed))
        disk.cannot_sync = has_failed
        syncer.sync()
        assert described.result(10).memory.status.num_rows == 1  # type: ignore[attr-defined]
        assert [each.status.num_rows for each in listed.result(10).memories] == [0, 1]  # type: ignore[attr-defined]
        assert (appended.exception(10) is not None) == has_failed
        disk.cannot_sync = False


def test_a_disk_quota_refuses_a_memory_that_would_not_fit() -> None:
    disk = FakeDisk()
    needed = disk_bytes(decode_spec(spec(durability=ALWAYS)))
    with serving(on_disk(DATA, disk, 2 * needed - 1)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        error = fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec("second", durability=INTERVAL)))
        assert isinstance(error, QuotaExceeded)
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("volatile")))
        server.stub.DropMemory(pb.DropMemoryRequest(name="notes"))
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("second", durability=INTERVAL)))


def test_a_volatile_memory_has_room_on_a_disk_that_is_beyond_its_quota() -> None:
    """As after a start with a smaller quota than before."""
    disk = FakeDisk()
    with serving(on_disk(DATA, disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
    with serving(on_disk(DATA, disk, 1)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("volatile")))
        error = fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec("second", durability=INTERVAL)))
    assert isinstance(error, QuotaExceeded)


def test_a_server_that_keeps_nothing_takes_no_durable_memory() -> None:
    with serving() as server:
        error = fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
    assert isinstance(error, InvalidRequest)
    assert error.metadata == {"field": "spec.durability"}


def test_a_disk_that_cannot_be_written_makes_no_memory_and_leaves_the_server_as_it_was() -> None:
    disk = FakeDisk()
    with serving(on_disk(DATA, disk)) as server:
        disk.is_full = True
        error = fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        assert isinstance(error, NotReady)
        assert server.registry.budget.reserved_bytes == 0
        disk.is_full = False
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        assert isinstance(fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec())), AlreadyExists)


def test_metrics_show_the_files() -> None:
    disk = FakeDisk()
    with serving(on_disk(DATA, disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        server.stub.Step(step())
        value = server.metrics.registry.get_sample_value
        assert (value("memstore_log_bytes", {"memory": "notes"}) or 0) > 0
        assert value("memstore_read_only", {"memory": "notes"}) == 0
        disk.is_full = True
        fails(server, "Step", step(seq=1))
        assert value("memstore_read_only", {"memory": "notes"}) == 1
        assert value("memstore_damaged_memories") == 0
