"""Durable memories in a server that is killed, stopped, and started over damaged files."""

from __future__ import annotations

import json
import signal
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from memstore.auth import DEFAULT_TENANT
from memstore.catalog import FileCatalog, MemoryId
from memstore.errors import (
    AlreadyExists,
    Corrupt,
    DeviceMemoryFull,
    Internal,
    InvalidRequest,
    NotFound,
    NotReady,
    QuotaExceeded,
)
from memstore.memory import Memory
from memstore.plane import InlinePlane
from memstore.registry import State
from memstore.seams import SystemDisk
from memstore.service import Caller
from memstore.store import PROGRESS_S, FileStore, Progress, Syncers, disk_bytes
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import decode_spec
from tests.calling import bearer, fails, failure, hashed, tokens
from tests.fakes import Diligent, FakeClock, FakeDisk, FakeReadFile
from tests.processes import Process
from tests.serving import Setting, Unwatched, file_store, serving, spec, step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memstore.v1.memstore_pb2_grpc import MemoryServiceStub

DATA = Path("/data")
ALWAYS, INTERVAL = pb.DURABILITY_ALWAYS, pb.DURABILITY_INTERVAL


@pytest.fixture
def started() -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.close()


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


def _setting(disk: FakeDisk, quota_bytes: int = 0) -> Setting:
    """A server whose files are on a fake disk."""
    return Setting(catalog=FileCatalog(DATA, disk), store=file_store(DATA, disk, FakeClock(), quota_bytes))


def test_a_server_is_not_serving_before_its_memories_are_read() -> None:
    disk = FakeDisk()
    with serving(_setting(disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        server.stub.Step(step())
    with serving(_setting(disk), loads=False) as server:
        assert server.health.status("") == health_pb2.HealthCheckResponse.NOT_SERVING
        assert isinstance(fails(server, "Step", step(seq=1)), NotReady)
        server.registry.load().result()
        assert server.health.status("") == health_pb2.HealthCheckResponse.SERVING
        assert server.stub.Step(step(seq=1)).sequences[0].first_position == 1


def test_a_memory_that_is_made_again_has_nothing_of_the_one_before() -> None:
    disk = FakeDisk()
    with serving(_setting(disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        epoch = server.stub.Step(step()).sequences[0].epoch
        server.stub.DropMemory(pb.DropMemoryRequest(name="notes"))
        assert [path for path in disk.files if "memories" in path.parts] == []
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        again = server.stub.Step(step()).sequences[0]
        assert (again.first_position, again.is_replay) == (0, False)
        assert again.epoch != epoch


class FailingDisk(FakeDisk):
    """Whose logs cannot be read for now."""

    def __init__(self) -> None:
        super().__init__()
        self.is_failing = threading.Event()
        self.has_failed = threading.Event()

    def open(self, path: Path) -> FakeReadFile:
        if self.is_failing.is_set() and path.name.startswith("log-") and "notes" in path.parts:
            self.has_failed.set()
            raise OSError(5, "Input/output error")
        return super().open(path)


def test_a_memory_that_cannot_be_read_for_now_is_no_damage_and_is_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memstore.registry.RETRY_LOAD_S", 0.01)
    disk = FailingDisk()
    with serving(_setting(disk)) as server:
        for name in ("notes", "others", "dropped"):
            server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(name, durability=ALWAYS)))
            server.stub.Step(step(memory=name))
    disk.is_failing.set()
    with serving(_setting(disk)) as server:
        assert server.registry.state is State.SERVING
        assert server.stub.Step(step(memory="others", seq=1)).sequences[0].first_position == 1
        for call, request in (
            ("Step", step(seq=1)),
            ("DescribeMemory", pb.DescribeMemoryRequest(name="notes")),
            ("CreateMemory", pb.CreateMemoryRequest(spec=spec(durability=ALWAYS))),
        ):
            error = fails(server, call, request)
            assert isinstance(error, NotReady)
            assert "Input/output error" in str(error)
        lines = server.metrics.text().decode().splitlines()
        assert "memstore_damaged_memories 0.0" in lines
        assert "memstore_waiting_memories 1.0" in lines
        disk.has_failed.clear()
        assert disk.has_failed.wait(10), "it is tried again"
        disk.is_failing.clear()
        while not server.registry.is_loaded(DEFAULT_TENANT, "notes"):
            server.stub.ServerInfo(pb.ServerInfoRequest())
        assert server.stub.Step(step(seq=1)).sequences[0].first_position == 1
        assert "memstore_waiting_memories 0.0" in server.metrics.text().decode().splitlines()
    disk.is_failing.set()
    with serving(_setting(disk)) as server:
        server.stub.DropMemory(pb.DropMemoryRequest(name="notes"))
        disk.is_failing.clear()
        assert isinstance(fails(server, "Step", step(seq=2)), NotFound)
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        assert server.stub.Step(step()).sequences[0].first_position == 0


@pytest.mark.parametrize("is_later", [False, True], ids=["start", "later"])
def test_a_bug_in_loading_one_memory_keeps_no_other_from_being_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_later: bool
) -> None:
    monkeypatch.setattr("memstore.registry.RETRY_LOAD_S", 0.01)
    disk = FailingDisk()
    with serving(_setting(disk)) as server:
        for name in ("buggy", "notes"):
            server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(name, durability=ALWAYS)))
            server.stub.Step(step(memory=name))
    disk.is_failing.set()
    recover = FileStore.recover

    def fail(store: FileStore, memory: MemoryId, *rest: Any) -> Any:
        if memory.name == "buggy":
            if is_later and disk.is_failing.is_set():
                raise NotReady("not now")
            raise KeyError("a bug")
        return recover(store, memory, *rest)

    monkeypatch.setattr(FileStore, "recover", fail)
    with serving(_setting(disk)) as server:
        disk.is_failing.clear()
        while not server.registry.is_loaded(DEFAULT_TENANT, "notes") or server.registry.num_waiting:
            server.stub.ServerInfo(pb.ServerInfoRequest())
        assert server.stub.Step(step(seq=1)).sequences[0].first_position == 1
        assert isinstance(fails(server, "Step", step(memory="buggy", seq=1)), Internal)
        assert "memstore_damaged_memories 1.0" in server.metrics.text().decode().splitlines()
    assert "KeyError: 'a bug'" in caplog.text


def test_a_stop_does_not_wait_until_a_memory_is_read() -> None:
    """It can be long; what was read is given up, and the next start reads it again."""
    disk = SlowDisk()
    with serving(_setting(disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        for seq in range(3):
            server.stub.Step(step(seq=seq))
    disk.has_failed.set()
    with serving(_setting(disk), loads=False) as server:
        loading = server.registry.load()
        assert disk.is_reading.wait(10)
        server.registry.drain()
        disk.may_read.set()
        loading.result(10)
        assert not server.registry.all()
    with serving(_setting(disk)) as server:
        assert server.stub.Step(step(seq=3)).sequences[0].first_position == 3


def test_a_memory_whose_index_cannot_begin_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def setting() -> Setting:
        disk = SystemDisk()
        return Setting(store=file_store(tmp_path, disk, FakeClock()), catalog=FileCatalog(tmp_path, disk))

    def num_open() -> int:
        return sum(f"{tmp_path}" in str(link) for link in map(_target, Path("/proc/self/fd").iterdir()))

    with serving(setting()) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        server.stub.Step(step())

    def fail(_: Memory) -> None:
        raise DeviceMemoryFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "wake", fail)
        with serving(made := setting()) as server:
            assert isinstance(fails(server, "Step", step(seq=1)), DeviceMemoryFull)
            assert num_open() == 0
            assert isinstance(made.store, FileStore)
            assert made.store.used_bytes == server.registry.budget.reserved_bytes == 0
    with serving(setting()) as server:
        assert server.stub.Step(step(seq=1)).sequences[0].first_position == 1


def _target(link: Path) -> Path | None:
    try:
        return link.readlink()
    except OSError:  # it was that of the listing
        return None


class SlowDisk(FailingDisk):
    """Whose logs are read only when they may be, once they do not fail any more."""

    def __init__(self) -> None:
        super().__init__()
        self.is_reading, self.may_read = threading.Event(), threading.Event()

    def open(self, path: Path) -> FakeReadFile:
        file = super().open(path)
        if self.has_failed.is_set() and "notes" in path.parts:
            self.is_reading.set()
            assert self.may_read.wait(10)
        return file


def test_a_memory_that_is_read_later_holds_up_no_other_tenants_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memstore.registry.RETRY_LOAD_S", 0.01)
    disk = SlowDisk()
    known = tokens(hashed("r", "red"), hashed("b", "blue"))
    with serving(replace(_setting(disk), authenticator=known)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)), metadata=bearer("r"))
        server.stub.Step(step(), metadata=bearer("r"))
    disk.is_failing.set()
    with serving(replace(_setting(disk), authenticator=known)) as server:
        disk.is_failing.clear()
        assert disk.is_reading.wait(10)
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()), metadata=bearer("b"), timeout=10)
        drop = server.stub.DropMemory.future(pb.DropMemoryRequest(name="notes"), metadata=bearer("r"))
        server.stub.ListMemories(pb.ListMemoriesRequest(), metadata=bearer("b"), timeout=10)
        assert not drop.done(), "its own tenant's wait for it"
        disk.may_read.set()
        drop.result()
        assert not server.registry.is_loaded("red", "notes")
        assert server.registry.num_waiting == 0


def test_what_a_crash_left_of_a_dropped_memory_does_not_come_back() -> None:
    disk = FakeDisk()
    with serving(_setting(disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        server.stub.Step(step())
        left = dict(disk.files)
        server.stub.DropMemory(pb.DropMemoryRequest(name="notes"))
    disk.files.update({path: content for path, content in left.items() if "memories" in path.parts})
    with serving(_setting(disk)) as server:
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
    with serving(_setting(disk, 2 * needed - 1)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        error = fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec("second", durability=INTERVAL)))
        assert isinstance(error, QuotaExceeded)
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("volatile")))
        server.stub.DropMemory(pb.DropMemoryRequest(name="notes"))
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("second", durability=INTERVAL)))


def test_a_volatile_memory_has_room_on_a_disk_that_is_beyond_its_quota() -> None:
    """As after a start with a smaller quota than before."""
    disk = FakeDisk()
    with serving(_setting(disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
    with serving(_setting(disk, 1)) as server:
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
    with serving(_setting(disk)) as server:
        disk.is_full = True
        error = fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        assert isinstance(error, NotReady)
        assert server.registry.budget.reserved_bytes == 0
        disk.is_full = False
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        assert isinstance(fails(server, "CreateMemory", pb.CreateMemoryRequest(spec=spec())), AlreadyExists)


def test_metrics_show_the_files() -> None:
    disk = FakeDisk()
    with serving(_setting(disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        server.stub.Step(step())
        value = server.metrics.registry.get_sample_value
        assert (value("memstore_log_bytes", {"memory": "notes"}) or 0) > 0
        assert value("memstore_read_only", {"memory": "notes"}) == 0
        disk.is_full = True
        fails(server, "Step", step(seq=1))
        assert value("memstore_read_only", {"memory": "notes"}) == 1
        assert value("memstore_damaged_memories") == 0


def test_a_long_load_says_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    progress = Progress("notes", clock, threading.Event())
    caplog.set_level("INFO", "memstore.store")
    progress(10, 100)
    clock.advance(PROGRESS_S)
    progress(40, 100)
    progress(41, 100)
    clock.advance(PROGRESS_S)
    progress(80, 100)
    assert [record.memstore_fields["percent"] for record in caplog.records] == [40, 80]  # type: ignore[attr-defined]
