"""One durable memory through random lives: calls, full and failing disks, snapshots, kills, losses of power.

A volatile twin is given every call that the memory took. After each stop the memory must be as the twin was after some
call, and no earlier one than what was promised. Some have one place fewer than sequences; the twin has one for each.
Everything follows from one seed; a failure prints it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, TypeVar
from unittest.mock import patch

import pytest
import torch

from memstore import still
from memstore.errors import Corrupt, MemstoreError, NotReady, QuotaExceeded, ReadOnly
from memstore.memory import Memory
from memstore.types import Durability, Metric, SpillSpec, StepBatch
from tests.fakes import Diligent, FakeDisk
from tests.lives import SPEC, SPILLED, Life, batch, contents

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from memstore.types import MemorySpec
    from tests.fakes import FakeAppendFile
    from tests.lives import Picture

    Done = tuple[int, Callable[[Memory], object]]

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "150"))
FIRST_SEED = int(os.environ.get("SIMULATION_FIRST_SEED", "0"))
NAMES = ["a", "b", "c", "d"]
SPILLS = [SpillSpec(), SpillSpec(max_sequences=1), SpillSpec(max_sequences=1, host_sequences=1)]
T = TypeVar("T")


class Crash(BaseException):
    """The process is gone, in the middle of whatever it did."""


class CrashingDisk(FakeDisk):
    """Ends the process at one of its changes, before or after it, or in the middle of a write."""

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.chance = random
        self.crash_in = 0
        self.is_dead = False

    def change(self, run: Callable[[], T]) -> T:
        """One change of the disk, which may be the last."""
        if self.is_dead:
            raise Crash
        self.crash_in -= 1
        if self.crash_in != 0:
            return run()
        self.is_dead = True
        if self.chance.random() < 0.5:
            run()
        raise Crash

    def add(self, path: Path, content: bytes) -> None:
        if not self.is_dead and self.crash_in == 1 and self.chance.random() < 0.5:
            content = content[: self.chance.randrange(len(content) + 1)]
            self.is_dead = True
            super().add(path, content)
            raise Crash
        self.change(lambda: super(CrashingDisk, self).add(path, content))

    def sync(self, path: Path) -> None:
        self.change(lambda: super(CrashingDisk, self).sync(path))

    def create(self, path: Path) -> FakeAppendFile:
        return self.change(lambda: super(CrashingDisk, self).create(path))

    def replace(self, path: Path, content: bytes) -> None:
        self.change(lambda: super(CrashingDisk, self).replace(path, content))

    def rename(self, source: Path, target: Path) -> None:
        self.change(lambda: super(CrashingDisk, self).rename(source, target))

    def remove(self, path: Path) -> None:
        self.change(lambda: super(CrashingDisk, self).remove(path))


class Epochs:
    """Epochs that can be dealt out a second time."""

    def __init__(self) -> None:
        self.next = 1

    def __iter__(self) -> Epochs:
        return self

    def __next__(self) -> int:
        self.next += 1
        return self.next - 1


class Simulation:
    """The lives of one memory, from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.disk = CrashingDisk(self.random)
        self.epochs = Epochs()
        self.spec = _spec(self.random)
        self.syncer = Diligent(waits=True)
        self.life = Life(self.disk, self.spec, is_new=True, syncer=self.syncer, epochs=self.epochs)
        self.twin = self.new_twin()
        self.calls: list[Done] = []
        self.picture = contents(self.twin)
        self.answered = self.synced = 0
        self.under_way: Done | None = None
        self.num_snapshots = self.num_stops = self.num_mended = 0

    def run(self, num_steps: int) -> None:
        """So many things happen."""
        for _ in range(num_steps):
            if self.random.random() < 0.25:
                self.disk.crash_in = self.random.randint(1, 12)
            try:
                self.something()
            except Crash:
                self.stop()
            self.disk.crash_in = 0
        self.disk.is_full = self.disk.cannot_sync = False
        self.stop()

    def something(self) -> None:
        """One thing happens."""
        what = self.random.choices(
            (self.call, self.sync, self.snapshot, self.damage, self.close, self.stop, self.trouble),
            (12, 4, 2, 2, 1, 1, 1),
        )[0]
        what()

    def call(self) -> None:
        """A call, which the twin is given too where the memory takes it."""
        call, epoch = self.some_call(), self.epochs.next
        self.under_way = (epoch, call)
        try:
            call(self.life.memory)
        except ReadOnly:
            assert self.disk.is_full or self.life.archive.journal.failure
            assert contents(self.life.memory) == self.picture
        except QuotaExceeded:
            assert self.disk.is_full, "there is room for all names"
            assert contents(self.life.memory) == self.picture
        except MemstoreError as error:
            with pytest.raises(type(error)):
                self.redo(epoch, call)
        else:
            self.redo(epoch, call)
            self.calls.append((epoch, call))
            self.picture = contents(self.twin)
            number = len(self.calls)
            if self.spec.durability is Durability.INTERVAL:
                self.answered = number
            else:
                self.life.memory.settle(lambda problem: self.settled(number, problem))
            assert contents(self.life.memory) == self.picture
        self.under_way = None

    def settled(self, number: int, problem: object) -> None:
        """A caller has its answer. What is read after a failed sync may not be safe, and promises nothing."""
        if problem is None and not self.life.archive.journal.has_failed:
            self.answered = max(self.answered, number)

    def sync(self) -> None:
        """The sync thread has its turn."""
        number = len(self.calls)
        self.syncer.sync()
        self.life.archive.journal.sync()
        if not self.life.archive.journal.failure:
            self.synced = number

    def snapshot(self) -> None:
        """A snapshot, between whose pieces other calls come."""
        try:
            self.num_snapshots += self.life.archive.snapshot(self.life.memory, self.control)
        except (OSError, NotReady):
            assert self.disk.is_full or self.disk.cannot_sync

    def damage(self) -> None:
        """Files of spilled sequences are cut short; a snapshot has the sequences from the log, unless the end comes."""
        if self.disk.is_full or self.disk.cannot_sync or self.life.archive.journal.failure:
            return
        damaged = [path for path in self.disk.files if SPILLED in path.parents]
        self.disk.files.update({path: self.disk.files[path][:-1] for path in damaged})
        assert self.life.archive.snapshot(self.life.memory, self.life.control)
        assert contents(self.life.memory) == self.picture
        self.num_mended += len(damaged)

    def control(self, run: Callable[[], T], /) -> Future[T]:
        """The device's thread, which has other things to do; in a snapshot, after each row."""
        if self.disk.is_dead:
            raise Crash
        if self.random.random() < 0.5:
            self.call()
        with patch.object(still, "PIECE_BYTES", 1):
            return self.life.control(run)

    def close(self) -> None:
        """A stop in order."""
        try:
            self.life.archive.close()
        except OSError:
            assert self.disk.is_full or self.disk.cannot_sync
            self.stop(loses_power=False)
            return
        failed = self.life.archive.journal.has_failed
        if not failed:
            self.synced = self.answered = len(self.calls)
        self.stop(loses_power=None if not failed else False)

    def trouble(self) -> None:
        """The disk is full or failing for a while, or well again."""
        self.disk.is_full = self.random.random() < 0.3
        self.disk.cannot_sync = self.random.random() < 0.1

    def stop(self, loses_power: bool | None = None) -> None:
        """The end of a life and the beginning of the next, which may end as it begins."""
        if loses_power is None:
            loses_power = self.random.random() < 0.5
        renewals: list[int] = []
        had_power = True
        while True:
            self.num_stops += 1
            had_power &= not loses_power
            self.disk.is_full = self.disk.cannot_sync = self.disk.is_dead = False
            self.disk.crash_in = self.random.choice([0, 0, self.random.randint(1, 8)])
            (self.disk.power_off if loses_power else self.disk.kill)()
            self.syncer.asking.clear()
            epoch = self.epochs.next
            try:
                life = self.life.again()
            except Crash:
                renewals.append(epoch)
                loses_power = self.random.random() < 0.5
                continue
            except Corrupt as error:
                raise AssertionError("an intact memory is taken for damaged") from error
            break
        self.disk.crash_in = 0
        self.life = life
        self.compare(epoch, renewals, had_power)
        self.under_way = None

    def compare(self, epoch: int, renewals: Sequence[int], had_power: bool) -> None:
        """Finds the call after which the memory stands, and goes on from there.

        epoch: the next one when it was read. renewals: the same at each start before that came to nothing.
        """
        assert self.life.found is not None
        calls = [*self.calls, *([self.under_way] if self.under_way else [])]
        got = contents(self.life.memory)
        least = self.least(had_power)
        is_renewed = self.life.found.is_loss_possible and self.spec.durability is Durability.INTERVAL
        last = [(epoch, Memory.renew)] if is_renewed else []
        for number in range(len(calls), least - 1, -1):
            for before in ([], *([(each, Memory.renew)] for each in renewals)):
                candidate = [*calls[:number], *before, *last]
                picture = self.replayed(candidate)
                if picture == got:
                    # What was acknowledged may be gone only where every sequence has a new epoch.
                    assert number >= self.answered or before or last
                    self.calls, self.picture = candidate, got
                    self.answered = self.synced = len(candidate)
                    return
        raise AssertionError(f"the memory is not as after any of the calls {least} to {len(calls)}")

    def least(self, had_power: bool) -> int:
        """Calls that must be there."""
        if had_power:
            return len(self.calls)
        return max(self.synced, self.answered if self.spec.durability is Durability.ALWAYS else 0)

    def replayed(self, calls: Sequence[Done]) -> Picture | None:
        """What there is to see of a new twin after these calls; None where it refuses one."""
        self.twin = self.new_twin()
        for epoch, call in calls:
            try:
                self.redo(epoch, call)
            except MemstoreError:
                return None
        return contents(self.twin)

    def redo(self, epoch: int, call: Callable[[Memory], object]) -> None:
        """Gives the twin a call, with the epochs that the memory had for it."""
        after, self.epochs.next = self.epochs.next, epoch
        call(self.twin)
        self.epochs.next = max(after, self.epochs.next)

    def new_twin(self) -> Memory:
        """A volatile memory that has seen nothing."""
        places = self.spec.total_sequences
        spec = replace(self.spec, durability=Durability.VOLATILE, max_sequences=places, spill=SpillSpec())
        return Memory(spec, torch.device("cpu"), new_epoch=self.epochs.__next__)

    def some_call(self) -> Callable[[Memory], object]:
        """An append of the next seq, or of one before; a reset, an end or a fork."""
        kind, name = self.random.random(), self.random.choice(NAMES)
        if kind < 0.75:
            writer = self.random.choice(["", "v", "w", "w"])
            sequence = self.life.memory._table.get(name)
            known = sequence.writers.get(writer) if sequence is not None else None
            start = self.random.random() < 0.1
            seq = 0 if known is None or start else known.next_seq - self.random.choice([0, 0, 0, 1, -1])
            rows, value = self.random.randint(0, 6), self.random.randint(0, 3)
            step = batch(self.spec, name, rows, max(seq, 0), writer=writer, value=value, start=start)
            return lambda memory: _taken(memory, step)
        if kind < 0.8 and self.spec.spill.max_sequences:
            is_pinned = self.random.random() < 0.5
            return lambda memory: memory.pin(["a"], is_pinned)
        if kind < 0.9:
            release = self.random.random() < 0.5
            return lambda memory: memory.reset([name, "never"], release)
        target, share = self.random.choice(NAMES), self.random.choice([None, 1, 3])
        return lambda memory: memory.fork(name, target, share, 0)


def _spec(random: Random) -> MemorySpec:
    return replace(
        SPEC,
        dim=random.randint(1, 3),
        capacity=random.randint(1, 5),
        num_layers=random.randint(1, 2),
        metric=random.choice(list(Metric)),
        durability=random.choice([Durability.ALWAYS, Durability.INTERVAL]),
        max_sequences=4 if (spill := random.choice(SPILLS)) == SpillSpec() else 3,
        spill=spill,
    )


def _taken(memory: Memory, step: StepBatch) -> None:
    (result,) = memory.step([step])
    if isinstance(result, MemstoreError):
        raise result


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + SEEDS, 10))
@pytest.mark.timeout(600)
def test_whatever_happens_no_answer_is_taken_back(seed: int) -> None:
    num_snapshots = num_mended = 0
    for each in range(seed, min(seed + 10, FIRST_SEED + SEEDS)):
        try:
            simulation = Simulation(each)
            simulation.run(60)
        except BaseException as error:
            error.add_note(f"seed {each}: Simulation({each}).run(60)")
            raise
        num_snapshots += simulation.num_snapshots
        num_mended += simulation.num_mended
    assert num_snapshots > 0
    assert num_mended > 0 or seed != 0, "of these it is known that they mend some files"
