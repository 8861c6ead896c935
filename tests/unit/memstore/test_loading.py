"""Durable memories that are read while a server starts, or later, and what keeps one from being read."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from grpc_health.v1 import health_pb2

from memstore.auth import DEFAULT_TENANT
from memstore.errors import (
    DeviceMemoryFull,
    Internal,
    NotFound,
    NotReady,
)
from memstore.memory import Memory
from memstore.registry import State
from memstore.seams import SystemDisk
from memstore.store import PROGRESS_S, FileStore, Progress
from memstore.v1 import memstore_pb2 as pb
from tests.calling import bearer, fails, hashed, tokens
from tests.fakes import FakeClock, FakeDisk, FakeReadFile
from tests.serving import on_disk, serving, spec, step

if TYPE_CHECKING:
    from memstore.catalog import MemoryId

DATA = Path("/data")
ALWAYS = pb.DURABILITY_ALWAYS


def test_a_server_is_not_serving_before_its_memories_are_read() -> None:
    disk = FakeDisk()
    with serving(on_disk(DATA, disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        server.stub.Step(step())
    with serving(on_disk(DATA, disk), loads=False) as server:
        assert server.health.status("") == health_pb2.HealthCheckResponse.NOT_SERVING
        assert isinstance(fails(server, "Step", step(seq=1)), NotReady)
        server.registry.load().result()
        assert server.health.status("") == health_pb2.HealthCheckResponse.SERVING
        assert server.stub.Step(step(seq=1)).sequences[0].first_position == 1


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
    with serving(on_disk(DATA, disk)) as server:
        for name in ("notes", "others", "dropped"):
            server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(name, durability=ALWAYS)))
            server.stub.Step(step(memory=name))
    disk.is_failing.set()
    with serving(on_disk(DATA, disk)) as server:
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
    with serving(on_disk(DATA, disk)) as server:
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
    with serving(on_disk(DATA, disk)) as server:
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
    with serving(on_disk(DATA, disk)) as server:
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
    with serving(on_disk(DATA, disk)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        for seq in range(3):
            server.stub.Step(step(seq=seq))
    disk.has_failed.set()
    with serving(on_disk(DATA, disk), loads=False) as server:
        loading = server.registry.load()
        assert disk.is_reading.wait(10)
        server.registry.drain()
        disk.may_read.set()
        loading.result(10)
        assert not server.registry.all()
    with serving(on_disk(DATA, disk)) as server:
        assert server.stub.Step(step(seq=3)).sequences[0].first_position == 3


def test_a_memory_whose_index_cannot_begin_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def num_open() -> int:
        return sum(f"{tmp_path}" in str(link) for link in map(_target, Path("/proc/self/fd").iterdir()))

    with serving(on_disk(tmp_path, SystemDisk())) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)))
        server.stub.Step(step())

    def fail(_: Memory) -> None:
        raise DeviceMemoryFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "wake", fail)
        with serving(made := on_disk(tmp_path, SystemDisk())) as server:
            assert isinstance(fails(server, "Step", step(seq=1)), DeviceMemoryFull)
            assert num_open() == 0
            assert isinstance(made.store, FileStore)
            assert made.store.used_bytes == server.registry.budget.reserved_bytes == 0
    with serving(on_disk(tmp_path, SystemDisk())) as server:
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
    with serving(replace(on_disk(DATA, disk), authenticator=known)) as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec(durability=ALWAYS)), metadata=bearer("r"))
        server.stub.Step(step(), metadata=bearer("r"))
    disk.is_failing.set()
    with serving(replace(on_disk(DATA, disk), authenticator=known)) as server:
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
