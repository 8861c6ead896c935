"""Threads that sync: who waits for them, and who does not."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from memstore.admission import Admission, QueueLimits
from memstore.changes import Appended, Forked, Released, Renewed, decode, encode
from memstore.device import DeviceWorker
from memstore.errors import ReadOnly
from memstore.jobs import StepJob, Ticket
from memstore.journal import INTERVAL_S, Syncer
from memstore.memory import Memory
from memstore.sequence import Reply
from memstore.snapshotter import Snapshotter
from memstore.types import Durability, MemorySpec
from tests.fakes import FakeClock, FakeDisk, FakeReply
from tests.lives import CPU, SPEC, Life, OneMemory, batch
from tests.serving import Unwatched

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from memstore.types import StepBatch


class SlowDisk(FakeDisk):
    """A disk whose syncs end when they are let, one by one or all."""

    def __init__(self) -> None:
        super().__init__()
        self.may_sync = threading.Event()
        self.is_syncing = threading.Event()
        self.one = threading.Semaphore(0)

    def sync(self, path: Path) -> None:
        self.is_syncing.set()
        while not self.may_sync.is_set() and not self.one.acquire(timeout=0.01):
            """Neither this one nor all may end."""
        super().sync(path)


@pytest.fixture
def worker() -> Iterator[DeviceWorker]:
    made = DeviceWorker(CPU, Admission(QueueLimits()), FakeClock())
    yield made
    made.close()


def _submit(worker: DeviceWorker, memory: Memory, step: StepBatch) -> Future[object]:
    ticket = Ticket(tenant="t", num_bytes=1, deadline=None, request_id="r")
    job: StepJob[object] = StepJob(ticket, memory.spec.name, memory, lambda: step, FakeReply())
    return worker.submit(job)


def _life(disk: SlowDisk, syncer: Syncer, spec: MemorySpec = SPEC) -> Life:
    disk.may_sync.set()
    life = Life(disk, spec, is_new=True, syncer=syncer)  # type: ignore[arg-type]
    disk.may_sync.clear()
    disk.is_syncing.clear()
    return life


def test_nobody_but_those_who_asked_for_it_waits_for_a_sync(worker: DeviceWorker) -> None:
    disk, syncer = SlowDisk(), Syncer(0.0)
    life = _life(disk, syncer)
    volatile = Memory(replace(SPEC, durability=Durability.VOLATILE), CPU, new_epoch=life.epochs.__next__)
    first = _submit(worker, life.memory, batch(SPEC, "a", 1, 0))
    disk.is_syncing.wait()
    second = _submit(worker, life.memory, batch(SPEC, "a", 1, 1))
    asks = replace(batch(SPEC, "a", 1, 0, writer=""), append=False)
    third = _submit(worker, life.memory, asks)  # it sees rows that are not synced
    assert _submit(worker, volatile, batch(SPEC, "a", 1, 0)).result()
    assert worker.admission.num_requests == 3
    assert not any(each.done() for each in (first, second, third))
    num_syncs = disk.num_syncs
    disk.is_syncing.clear()
    disk.one.release()
    first.result()
    disk.is_syncing.wait()
    assert not second.done()  # it came while the first was synced, and is not safe yet
    assert not third.done()
    disk.may_sync.set()
    second.result()
    third.result()
    assert disk.num_syncs == num_syncs + 2  # one for the first, and one for all that came meanwhile
    syncer.close()


def test_a_sync_that_fails_refuses_those_who_changed_something_and_answers_the_others(worker: DeviceWorker) -> None:
    disk, syncer = SlowDisk(), Syncer(0.0)
    life = _life(disk, syncer)
    appended = _submit(worker, life.memory, batch(SPEC, "a", 1, 0))
    disk.is_syncing.wait()
    asked = _submit(worker, life.memory, replace(batch(SPEC, "a", 1, 0, writer=""), append=False))
    worker.control(lambda: None).result()
    disk.cannot_sync = True
    disk.may_sync.set()
    assert isinstance(appended.exception(), ReadOnly)
    assert asked.result()
    syncer.close()


def test_interval_is_synced_soon_without_being_waited_for(worker: DeviceWorker) -> None:
    assert INTERVAL_S <= 0.5
    disk, syncer = SlowDisk(), Syncer(0.001)
    life = _life(disk, syncer, replace(SPEC, durability=Durability.INTERVAL))
    _submit(worker, life.memory, batch(SPEC, "a", 1, 0)).result()
    assert disk.is_syncing.wait(10)
    disk.may_sync.set()
    syncer.close()
    assert disk.num_syncs > 0


def test_closing_a_syncer_syncs_what_asked() -> None:
    disk, syncer = SlowDisk(), Syncer(3600)
    life = _life(disk, syncer, replace(SPEC, durability=Durability.INTERVAL))
    life.append("a", 1, 0)
    num_syncs = disk.num_syncs
    disk.may_sync.set()
    syncer.close()
    assert disk.num_syncs == num_syncs + 1


def test_changes_come_back_as_they_were() -> None:
    reply = Reply(num_rows=3, fingerprint=2**32 - 1, as_of=5, first_position=2**40, begun_from=2**63 - 1)
    changes = [
        Appended("a", 2**63 - 1, True, 3, 2**40, "w", reply),
        Appended("b", 0, True, 0, 7, "", None),
        Appended("c", 9, False),
        Appended("d", 1, True, 1, 0, "w", reply._replace(num_rows=1, first_position=0, begun_from=None)),
        Released("x" * 128),
        Forked("a", "b", 7, 3, 9),
        Renewed("a", 8),
    ]
    assert decode(memoryview(encode(changes))) == changes


def test_a_snapshot_is_due_when_the_log_is_old_or_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    life = Life(FakeDisk(), is_new=True)
    registry = OneMemory(life)
    snapshotter = Snapshotter(registry, clock, 100.0, Unwatched())  # type: ignore[arg-type]
    snapshotter.close()
    assert not snapshotter._is_due(registry)  # type: ignore[arg-type]
    life.append("a", 1, 0)
    assert not snapshotter._is_due(registry)  # type: ignore[arg-type]
    clock.advance(100.0)
    assert snapshotter._is_due(registry)  # type: ignore[arg-type]
    snapshotter.finish()
    assert life.archive.journal.num_kept == 0
    assert not snapshotter._is_due(registry)  # type: ignore[arg-type]
    life.append("a", 1, 1)
    assert not snapshotter._is_due(registry)  # type: ignore[arg-type]
    monkeypatch.setattr("memstore.snapshotter.log_limit", lambda spec: 1)
    assert snapshotter._is_due(registry)  # type: ignore[arg-type]
    life.disk.is_full = True
    snapshotter.finish()
    assert not snapshotter._is_due(registry)  # type: ignore[arg-type]  # not before the interval is over
    clock.advance(100.0)
    assert snapshotter._is_due(registry)  # type: ignore[arg-type]


def test_a_bug_in_one_snapshot_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    life = Life(FakeDisk(), is_new=True)
    registry = OneMemory(life)
    snapshotter = Snapshotter(registry, clock, 100.0, Unwatched())  # type: ignore[arg-type]
    snapshotter.close()
    life.append("a", 1, 0)
    with monkeypatch.context() as broken:
        broken.setattr(life.archive, "snapshot", lambda *_: {}["a bug"])
        snapshotter.finish()
    assert life.archive.journal.num_kept == 1
    snapshotter.finish()
    assert life.archive.journal.num_kept == 0
