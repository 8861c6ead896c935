"""Memories that are dropped: what waits for it, and what does not."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from memstore.admission import Admission, CapacityBudget, QueueLimits
from memstore.auth import Open
from memstore.catalog import FileCatalog, MemoryId
from memstore.device import DeviceWorker
from memstore.errors import MemstoreError, NotFound, NotReady, QuotaExceeded
from memstore.expirer import Expirer
from memstore.quotas import Quotas
from memstore.registry import Registry, State
from memstore.store import disk_bytes
from memstore.tokens import Quota
from memstore.turns import SERVER
from memstore.types import Durability, MemorySpec, RetrieveOptions, SpillSpec
from tests.fakes import FakeClock, FakeDisk
from tests.lives import batch
from tests.serving import file_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memstore.jobs import Settling
    from memstore.rooms import Loaded

DATA = Path("/data")
SPILLING = MemorySpec(name="m", dim=2, capacity=4, max_sequences=1, spill=SpillSpec(max_sequences=3))
DURABLE = MemorySpec(name="m", dim=2, capacity=4, durability=Durability.INTERVAL)
A, B = MemoryId("a", "m"), MemoryId("b", "m")
WAIT_S = 10.0


class SlowDisk(FakeDisk):
    """Removes a folder only when it may; says in which threads it did."""

    def __init__(self) -> None:
        super().__init__()
        self.may_remove = threading.Event()
        self.may_remove.set()
        self.is_removing = threading.Event()
        self.removers: set[str] = set()
        self.cannot_remove = False

    def remove_folder(self, path: Path) -> None:
        if self.cannot_remove:
            raise OSError(5, "Input/output error")
        if any(path in each.parents for each in list(self.files)):
            self.is_removing.set()
            assert self.may_remove.wait(WAIT_S)
            self.removers.add(threading.current_thread().name)
        super().remove_folder(path)

    def of(self, kind: str) -> list[Path]:
        """What lies in one of the folders of the data folder."""
        return [path for path in list(self.files) if DATA / kind in path.parents]


class HeldWorker(DeviceWorker):
    """A worker in which what is queued behind some tenants stays there until it is let go."""

    def __init__(self, device: torch.device, admission: Admission, clock: FakeClock) -> None:
        self._held: dict[str, list[tuple[Callable[[], Any], Future[Any]]]] = {}
        super().__init__(device, admission, clock)

    @property
    def num_held(self) -> int:
        """How much waits."""
        return sum(map(len, self._held.values()))

    def hold(self, tenant: str) -> None:
        """From now on."""
        self._held[tenant] = []

    def let_go(self, tenant: str) -> None:
        """All that waits goes on its way."""
        for run, waiting in self._held.pop(tenant, ()):
            self.control(run).add_done_callback(partial(_pass_on, waiting))

    def control(self, run: Callable[[], Any], engine: Settling | None = None, *, behind: str = SERVER) -> Future[Any]:
        if behind not in self._held:
            return super().control(run, engine, behind=behind)
        waiting: Future[Any] = Future()
        self._held[behind].append((run, waiting))
        return waiting


def _pass_on(waiting: Future[Any], done: Future[Any]) -> None:
    error = done.exception()
    if error is None:
        waiting.set_result(done.result())
    else:
        waiting.set_exception(error)


class Bench:
    """A registry with files."""

    def __init__(self, disk: SlowDisk | None = None, *, quota_bytes: int = 0) -> None:
        """quota_bytes: of the disk."""
        self.disk = disk or SlowDisk()
        self.clock = FakeClock()
        self.worker = HeldWorker(torch.device("cpu"), Admission(QueueLimits()), self.clock)
        self.budget = CapacityBudget(1 << 20)
        self.store = file_store(DATA, self.disk, self.clock, quota_bytes)
        quotas = Quotas(Open(), Quota(sequences=8), self.clock)
        catalog = FileCatalog(DATA, self.disk)
        self.registry = Registry(catalog, self.worker, self.budget, self.clock, 10, self.store, quotas=quotas)
        self.registry.load().result(WAIT_S)

    def make(self, memory: MemoryId, spec: MemorySpec = SPILLING) -> Loaded:
        """A memory with three sequences of a row."""
        spec = replace(spec, name=memory.name)
        loaded, _ = self.registry.create(memory, spec, False).result(WAIT_S)
        for name in "xyz" if spec.spill.max_sequences else "x":
            (result,) = self.worker.control(partial(loaded.engine.step, [batch(spec, name, 1, 0)])).result(WAIT_S)
            assert not isinstance(result, MemstoreError)
        return loaded

    def close(self) -> None:
        """Ends its threads."""
        self.disk.may_remove.set()
        for tenant in "ab":
            self.worker.let_go(tenant)
        self.registry.close()
        self.worker.close()
        self.registry.close_files()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.mark.parametrize("spec", [SPILLING, DURABLE], ids=["spilled", "durable"])
def test_files_of_a_dropped_memory_hold_up_neither_the_device_nor_other_changes(bench: Bench, spec: MemorySpec) -> None:
    bench.make(A, spec)
    bench.make(B)
    bench.disk.may_remove.clear()
    dropped = bench.registry.drop(A)
    assert bench.disk.is_removing.wait(WAIT_S)
    bench.worker.control(lambda: None).result(WAIT_S)
    bench.make(MemoryId("b", "more"), MemorySpec(name="more", dim=2, capacity=4))
    assert [each.id for each in bench.registry.listing("b", "").result(WAIT_S)] == [B, MemoryId("b", "more")]  # type: ignore[union-attr]
    again = bench.make(A, spec)
    assert not dropped.done(), "its name and its room are free before its files have gone"
    bench.disk.may_remove.set()
    dropped.result(WAIT_S)
    assert not any(name.startswith(("memstore-cpu", "memstore-admin")) for name in bench.disk.removers)
    assert again.engine.counts().num_sequences == len(again.engine._table)
    kind = "spilled" if spec is SPILLING else "memories"
    assert bench.disk.of(kind), "what has the name now is there"
    assert not bench.disk.of("memories/a") or spec is DURABLE
    bench.registry.drop(A).result(WAIT_S)
    assert not [path for kind in ("spilled", "memories") for path in bench.disk.of(kind) if "a" in path.parts]
    assert bench.store.used_bytes > 0
    bench.registry.drop(B).result(WAIT_S)
    assert bench.store.used_bytes == 0


def test_a_drop_waits_for_the_jobs_of_its_own_tenant_and_nobody_waits_for_it(bench: Bench) -> None:
    bench.make(A)
    bench.make(B)
    bench.worker.hold("a")
    first = bench.registry.drop(A)
    bench.registry.drop(B).result(WAIT_S)
    bench.make(B)
    assert not first.done()
    bench.worker.let_go("a")
    first.result(WAIT_S)


def test_while_a_memory_goes_its_name_and_its_share_of_the_quota_are_taken(bench: Bench) -> None:
    bench.make(A)
    bench.make(MemoryId("a", "n"))
    bench.worker.hold("a")
    dropped = bench.registry.drop(A)
    with pytest.raises(NotReady, match="being removed"):
        bench.registry.create(A, SPILLING, False).result(WAIT_S)
    with pytest.raises(NotFound):
        bench.registry.find("a", "m")
    with pytest.raises(NotFound):
        bench.registry.drop(A).result(WAIT_S)
    with pytest.raises(QuotaExceeded):
        bench.registry.create(MemoryId("a", "o"), SPILLING, False).result(WAIT_S)
    assert bench.registry.held("a").sequences == 8
    bench.worker.let_go("a")
    dropped.result(WAIT_S)
    assert bench.registry.held("a").sequences == 4
    bench.make(A)


def test_who_found_a_memory_before_it_was_dropped_is_told_that_it_is_not_there(bench: Bench) -> None:
    loaded = bench.make(A, replace(SPILLING, idle_ttl_s=10))
    bench.registry.drop(A).result(WAIT_S)
    spec, engine = loaded.spec, loaded.engine
    look = replace(batch(spec, "x", 1, 1), append=False, retrieve=RetrieveOptions(top_k=1))
    bench.clock.advance(10)
    for run in (
        lambda: engine.step([look]),
        lambda: engine.step([batch(spec, "x", 1, 1)]),
        lambda: engine.fork("z", "w", None, 0),
        lambda: engine.reset(["x"], release=True),
        lambda: engine.pin(["z"], True),
        engine.expire,
    ):
        with pytest.raises(NotFound, match="dropped"):
            bench.worker.control(run).result(WAIT_S)


def test_a_folder_that_cannot_be_moved_keeps_no_share_of_quotas(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drop says so; bytes of device and disk, and files of spilled sequences, are given back all the same."""
    bench.make(A, replace(SPILLING, durability=Durability.INTERVAL))
    assert bench.registry.quotas._spilled["a"] > 0

    def fail(source: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(bench.disk, "rename", fail)
        with pytest.raises(NotReady, match="Input/output error"):
            bench.registry.drop(A).result(WAIT_S)
    assert (bench.budget.reserved_bytes, bench.store.used_bytes) == (0, 0)
    assert not bench.disk.of("spilled")
    assert "a" not in bench.registry.quotas._spilled
    bench.make(A)


def test_tenants_that_make_memories_side_by_side_do_not_pass_the_disk_quota() -> None:
    spec = replace(DURABLE, name="m")
    bench = Bench(quota_bytes=2 * disk_bytes(spec) - 1)
    try:
        bench.worker.hold("a")
        first = bench.registry.create(A, spec, False)
        while not bench.worker.num_held:
            bench.registry.listing("b", "").result(WAIT_S)
        bench.make(B, spec)
        bench.worker.let_go("a")
        with pytest.raises(QuotaExceeded, match="quota"):
            first.result(WAIT_S)
        assert bench.store.used_bytes == disk_bytes(spec)
        assert bench.registry.held("a").reserved_bytes == 0
        bench.registry.drop(B).result(WAIT_S)
        bench.make(A, spec)
    finally:
        bench.close()


def test_a_stop_waits_for_removals_no_longer_than_it_may(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """What is left is removed by the next start: what is under way, what has not begun, and what was spilled."""
    more = MemoryId("a", "n")
    for memory in (A, more):
        bench.make(memory, DURABLE)
    bench.make(B)
    bench.disk.may_remove.clear()
    under_way, waiting = bench.registry.drop(A), bench.registry.drop(more)
    assert bench.disk.is_removing.wait(WAIT_S)
    bench.registry.listing("a", "").result(WAIT_S)
    bench.registry.close(0.01)
    with pytest.raises(NotReady, match="stopping"):
        waiting.result(0)
    assert not under_way.done()
    assert "the next start goes on" in caplog.text
    bench.worker.close()
    bench.registry.close_files(0.01)
    assert bench.disk.of("spilled")
    left = SlowDisk()
    left.files = dict(bench.disk.files)
    after = Bench(left)
    after.close()
    assert not left.of("memories")
    assert not left.of("spilled")


def test_a_tenant_whose_jobs_take_long_holds_up_the_idle_sequences_of_no_other(bench: Bench) -> None:
    spec = replace(SPILLING, idle_ttl_s=10)
    for memory in (A, B):
        bench.make(memory, spec)
    bench.clock.advance(10)
    bench.worker.hold("a")
    expirer = Expirer(bench.registry)
    try:
        expirer.begin()
        expirer.begin()
        bench.worker.control(lambda: None, behind="b").result(WAIT_S)
        assert bench.registry.find("b", "m").engine.counts().num_sequences == 0
        assert bench.worker.num_held == 1, "one question at a time"
        bench.worker.let_go("a")
        expirer.check()
        assert bench.registry.find("a", "m").engine.counts().num_sequences == 0
    finally:
        expirer.close()


def test_what_a_crash_left_of_files_that_were_to_be_removed_goes_with_the_next_start(bench: Bench) -> None:
    bench.make(A, DURABLE)
    bench.make(B)
    bench.disk.may_remove.clear()
    drops = [bench.registry.drop(A), bench.registry.drop(B)]
    assert bench.disk.is_removing.wait(WAIT_S)
    bench.worker.control(lambda: None, behind="a").result(WAIT_S)
    bench.worker.control(lambda: None, behind="b").result(WAIT_S)
    left = FakeDisk()
    left.files = dict(bench.disk.files)
    assert any(DATA / "memories" in path.parents for path in left.files)
    file_store(DATA, left, FakeClock()).remove_rest()
    assert not [path for path in left.files if {"memories", "spilled"} & set(path.parts)]
    bench.disk.may_remove.set()
    for each in drops:
        each.result(WAIT_S)


def test_a_start_does_not_wait_for_what_an_earlier_server_left() -> None:
    disk = SlowDisk()
    for path in (
        DATA / "spilled" / "a" / "m~1" / "sequence-00000000",
        DATA / "memories" / "a" / ".m.1" / "log-00000001",
    ):
        disk.files[path] = b"old"
    disk.may_remove.clear()
    bench = Bench(disk)
    try:
        assert disk.is_removing.wait(WAIT_S)
        bench.make(A)
        assert bench.registry.state is State.SERVING
        disk.may_remove.set()
    finally:
        bench.close()
    assert not [path for path in disk.files if b"old" == disk.files[path]]


def test_what_cannot_be_removed_at_a_start_is_said_and_in_nobodys_way(caplog: pytest.LogCaptureFixture) -> None:
    disk = SlowDisk()
    disk.files[DATA / "spilled" / "a" / "m~1" / "sequence-00000000"] = b"old"
    disk.cannot_remove = True
    bench = Bench(disk)
    try:
        bench.make(A)
        disk.cannot_remove = False
    finally:
        bench.close()
    assert "not removed" in caplog.text


def test_what_a_crash_left_is_in_no_drops_way() -> None:
    """It may take long to remove, or fail; what is dropped meanwhile gets another name."""
    before = Bench()
    before.make(A, DURABLE)
    before.disk.may_remove.clear()
    drop = before.registry.drop(A)
    assert before.disk.is_removing.wait(WAIT_S)
    left = SlowDisk()
    left.files = dict(before.disk.files)
    before.disk.may_remove.set()
    drop.result(WAIT_S)
    before.close()
    left.may_remove.clear()
    bench = Bench(left)
    try:
        assert left.is_removing.wait(WAIT_S)
        bench.make(A, DURABLE)
        again = bench.registry.drop(A)
        left.may_remove.set()
        again.result(WAIT_S)
    finally:
        bench.close()
    assert not left.of("memories")
