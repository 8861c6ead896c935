"""What is thrown at durable memories and what is lost; how long a restart takes; what lasting costs.

kills       servers are killed at every point of their files while a client writes to them
flips       every bit of a small log and snapshot is flipped, one at a time
restart     a memory of 1 GB is read back from its snapshot, and from its log, with cold files
appends     rows a second by durability, against the disk's own write and sync, in turn
stall       retrievals of a volatile memory while a durable one syncs, or is taken a snapshot of

and what benchmarks.hostile has: seeded bugs, abuse of ports, mutated input, the simulation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, TypeVar

import torch

from benchmarks.hostile import abuse, mutations, seeded, simulation
from benchmarks.report import Report
from memstore.admission import Admission, QueueLimits
from memstore.archive import Archive
from memstore.device import DeviceWorker
from memstore.errors import Corrupt
from memstore.folder import MemoryFolder
from memstore.journal import INTERVAL_S, Syncer
from memstore.memory import Memory
from memstore.recovery import Recovery
from memstore.seams import SystemClock, SystemDisk, new_epoch
from memstore.types import Durability, MemorySpec, RetrieveOptions, SequencePart, StepBatch, StepResult
from tests.crash.history import lives
from tests.fakes import Diligent, FakeDisk
from tests.lives import FOLDER, SPEC, Life

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memstore.journal import Asked

T = TypeVar("T")
CPU = torch.device("cpu")
DISK = SystemDisk()
DIM = 256
GB = 10**9
SYNCED, SLOWER = "disk, each write synced", "the slower of interval and synced disk"
SLICE_S = 1.5
"""How long one of those that are compared goes on, before it is another's turn: three syncs of `interval`."""
WINDOW = 4
"""Appends that wait for their sync at once: what two sessions have under way."""


def kills(report: Report, number: int) -> None:
    """Servers killed at every point of their files."""
    with folder() as path:
        tally = lives(path, Random(0), number)
    report.add("kill -9 at failpoints", "kills", tally.kills, "count", better="higher")
    report.add("kill -9 at failpoints", "rows acknowledged", tally.acknowledged, "count", better="higher")
    report.add("kill -9 at failpoints", "acknowledged rows lost", tally.lost, "count", goal=0)
    report.add("kill -9 at failpoints", "rows there twice", tally.duplicates, "count", goal=0)


def flips(report: Report) -> None:
    """Every bit of the files of a small memory, and every length of each."""
    life = Life(FakeDisk(), replace(SPEC, dim=1), is_new=True)
    life.append("a", 2, 0)
    assert life.snapshot()
    life.append("a", 1, 1)
    life.archive.close()
    files = dict(life.disk.files)
    tried = missed = 0
    for path, content in files.items():
        for spoilt in spoilings(content):
            life.disk.files = {**files, path: spoilt}
            tried += 1
            try:
                life.again()
                missed += 1
            except Corrupt:
                continue
    assert len(files) == len([path for path in files if FOLDER in path.parents]) == 5
    report.add("flipped bits and truncations", "tried", tried, "count", better="higher")
    report.add("flipped bits and truncations", "not found", missed, "count", goal=0)


def spoilings(content: bytes) -> Iterator[bytes]:
    """The content with one bit flipped, each in turn, and cut to each shorter length."""
    for at in range(len(content) * 8):
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        yield bytes(changed)
    for size in range(len(content)):
        yield content[:size]


def restart(report: Report, size: int) -> None:
    """A memory of `size` bytes of rows, read back."""
    capacity = size // (32 * DIM * 2)
    spec = MemorySpec(name="m", dim=DIM, capacity=capacity, max_sequences=32, durability=Durability.INTERVAL)
    with folder() as path:
        memory, archive = made(spec, path, Diligent(waits=True))
        fill(memory, 512)
        archive.journal.sync()
        read_back(report, f"{size / GB:g} GB, from its log", spec, path, size)
        assert archive.snapshot(memory, at_once)
        read_back(report, f"{size / GB:g} GB, from its snapshot", spec, path, size)
        memory.free()


def read_back(report: Report, case: str, spec: MemorySpec, path: Path, size: int) -> None:
    """Reads files that the page cache has forgotten into a new memory; the best of three, as others only slow it."""
    seconds = min(one_read(spec, path) for _ in range(3))
    report.add(case, "seconds", seconds, "s")
    report.add(case, "time / (5 s + size at 500 MB/s)", seconds / (5 + size / 5e8), "ratio", goal=1.0)


def one_read(spec: MemorySpec, path: Path) -> float:
    """Seconds of one."""
    for file in path.rglob("*"):
        if file.is_file():
            forget(file)
    memory = Memory(spec, CPU, new_epoch=new_epoch)
    begun = time.perf_counter()
    Recovery(MemoryFolder(path / "m", DISK), "m", lambda done, total: None).run(memory)
    seconds = time.perf_counter() - begun
    memory.free()
    return seconds


def appends(report: Report, rounds: int) -> None:
    """Steps of 8 sequences x 64 rows by durability, and the same bytes written by hand, in turn.

    A disk that others use is four times faster in one minute than in the next: what is compared was done within three
    seconds, and a ratio is the median of those of the rounds. What waits for its sync has to be done as well: where the
    disk is faster than an `interval` memory, an `always` one cannot be as fast as the disk.
    """
    step_bytes = 8 * 64 * (DIM * 2 + 4)
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in ("volatile", "interval", "disk, written", "always", SYNCED):
            with folder() as path:
                done = by_hand(path, name, SLICE_S) if name.startswith("disk") else by_memory(path, name, SLICE_S)
            rates.setdefault(name, []).append(done * step_bytes / SLICE_S / 1e6)
    rates[SLOWER] = [min(pair) for pair in zip(rates["interval"], rates[SYNCED], strict=True)]
    case = "appends of 8 x 64 x 256 fp16"
    for name, values in rates.items():
        report.add(case, f"{name}", statistics.median(values), "MB/s", better="higher")
    pairs = (
        ("always", SYNCED, 0.8),
        ("always", SLOWER, None),
        ("interval", "disk, written", None),
        ("interval", "volatile", None),
    )
    for name, other, goal in pairs:
        ratio = statistics.median([one / two for one, two in zip(rates[name], rates[other], strict=True)])
        report.add(case, f"{name} / {other}", ratio, "ratio", goal=goal, better="higher")


def by_memory(path: Path, name: str, seconds: float) -> int:
    """Steps that were answered; as many wait for a sync as WINDOW says."""
    durability = Durability(name)
    spec = MemorySpec(name="m", dim=DIM, capacity=4096, max_sequences=8, durability=durability)
    syncer = Syncer(INTERVAL_S if durability is Durability.INTERVAL else 0.0)
    memory, archive = made(spec, path, syncer)
    room, answered = threading.Semaphore(WINDOW), 0

    def answer(problem: object) -> None:
        nonlocal answered
        assert problem is None
        answered += 1
        room.release()

    end, seq = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        room.acquire()
        memory.step([batch(8, 64, seq)])
        memory.settle(answer)
        seq += 1
    syncer.close()
    archive.close()
    memory.free()
    return answered


def by_hand(path: Path, name: str, seconds: float) -> int:
    """Writes of the size of a step."""
    content = os.urandom(8 * 64 * (DIM * 2 + 4))
    file = DISK.create(path / "file")
    end, done, synced = time.perf_counter() + seconds, 0, time.perf_counter()
    while time.perf_counter() < end:
        file.write([content])
        if name.endswith("synced") or time.perf_counter() - synced > INTERVAL_S:
            file.sync()
            synced = time.perf_counter()
        done += 1
    file.close()
    return done


def stall(report: Report, calls: int) -> None:
    """Retrievals of a volatile memory, alone and beside a durable one, through the device's thread."""
    times = {name: latencies(name, calls) for name in ("alone", "beside interval", "beside always", "synced in line")}
    times["during a snapshot"] = latencies("snapshot", calls)
    for name, values in times.items():
        report.add("a retrieval of a volatile memory", f"{name}, median", 1e3 * statistics.median(values), "ms")
        report.add("a retrieval of a volatile memory", f"{name}, 99%", 1e3 * values[int(0.99 * len(values))], "ms")
    for name in ("beside always", "synced in line", "during a snapshot"):
        ratio = statistics.median(times[name]) / statistics.median(times["beside interval"])
        report.add("a retrieval of a volatile memory", f"{name} / beside interval", ratio, "ratio")


def latencies(beside: str, calls: int) -> list[float]:
    """Seconds of each retrieval, sorted, while another memory is appended to as fast as it answers."""
    worker = DeviceWorker(CPU, Admission(QueueLimits()), SystemClock())
    volatile = Memory(MemorySpec(name="v", dim=DIM, capacity=1024, max_sequences=8), CPU, new_epoch=new_epoch)
    volatile.step([batch(8, 1024, 0)])
    durability = Durability.INTERVAL if beside in ("beside interval", "snapshot") else Durability.ALWAYS
    spec = MemorySpec(name="d", dim=DIM, capacity=16_384, max_sequences=8, durability=durability)
    syncer: Asked = Diligent() if beside == "synced in line" else Syncer(0.0)
    stopping = threading.Event()
    with folder() as path:
        durable, archive = made(spec, path, syncer)
        if beside == "snapshot":
            fill(durable, 512)
        others = [] if beside == "alone" else [threading.Thread(target=append_on, args=(worker, durable, stopping))]
        if beside == "snapshot":
            others.append(threading.Thread(target=snapshot_on, args=(worker, durable, archive, stopping)))
        for other in others:
            other.start()
        question = replace(batch(8, 1, 0), append=False, writer="", retrieve=RetrieveOptions(top_k=16))
        found = []
        for _ in range(calls):
            begun = time.perf_counter()
            worker.control(lambda: volatile.step([question])).result()
            found.append(time.perf_counter() - begun)
        stopping.set()
        for other in others:
            other.join()
        worker.close()
        if isinstance(syncer, Syncer):
            syncer.close()
        archive.close()
        durable.free()
        volatile.free()
    return sorted(found)


def append_on(worker: DeviceWorker, memory: Memory, stopping: threading.Event) -> None:
    """Appends, each when the one before is answered."""
    seq = int(memory.counts().num_rows > 0) * (memory.spec.capacity // 512)
    while not stopping.is_set():
        answered = threading.Event()

        def append(step: StepBatch, answered: threading.Event) -> None:
            memory.step([step])
            memory.settle(lambda problem: answered.set())

        step = batch(8, 8, seq)
        worker.control(lambda step=step, answered=answered: append(step, answered)).result()  # type: ignore[misc]
        answered.wait()
        seq += 1


def snapshot_on(worker: DeviceWorker, memory: Memory, archive: Archive, stopping: threading.Event) -> None:
    """Takes one snapshot after the other."""
    while not stopping.is_set():
        assert archive.snapshot(memory, worker.control)


def at_once(run: Callable[[], T], /) -> Future[T]:
    """Runs something as the device's thread would."""
    future: Future[T] = Future()
    future.set_result(run())
    return future


def made(spec: MemorySpec, path: Path, syncer: Asked) -> tuple[Memory, Archive]:
    """A new memory with its files in a folder, whatever its durability."""
    memory = Memory(spec, CPU, new_epoch=new_epoch)
    archive = Archive.create(MemoryFolder(path / "m", DISK), "m", spec, syncer)
    if spec.durability is not Durability.VOLATILE:
        memory.keeper = archive.journal
    return memory, archive


def fill(memory: Memory, rows: int) -> None:
    """Fills every sequence, so many rows an append."""
    for seq in range(memory.spec.capacity // rows):
        (result,) = memory.step([batch(memory.spec.max_sequences, rows, seq)])
        assert isinstance(result, StepResult)


def batch(sequences: int, rows: int, seq: int) -> StepBatch:
    """A step that appends."""
    keys = KEYS[: sequences * rows].view(1, -1, DIM) if sequences * rows <= len(KEYS) else None
    parts = tuple(SequencePart(sequence=str(each), num_rows=rows, seq=seq) for each in range(sequences))
    return StepBatch(
        parts=parts,
        layers=(0,),
        keys=torch.randn(1, sequences * rows, DIM).half() if keys is None else keys,
        append=True,
        writer="w",
        fingerprints=(seq,) * sequences,
    )


KEYS = torch.randn(32 * 512, DIM, generator=torch.Generator().manual_seed(0)).half()


def forget(file: Path) -> None:
    """Drops a file from the page cache."""
    number = os.open(file, os.O_RDONLY)
    try:
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(number)


@contextmanager
def folder() -> Iterator[Path]:
    """A folder beside this file's, on the disk that a server would have, for the length of the block."""
    path = Path(tempfile.mkdtemp(prefix="memstore-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    """Measures, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=45)
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    report = Report("reliability")
    flips(report)
    appends(report, 2 if options.quick else 10)
    stall(report, 500 if options.quick else 3000)
    restart(report, GB // 8 if options.quick else GB)
    kills(report, 15 if options.quick else options.kills)
    simulation(report, 50 if options.quick else 400)
    mutations(report, 200 if options.quick else 3000)
    abuse(report, 50 if options.quick else 200)
    seeded(report, options.quick)
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
