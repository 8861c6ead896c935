"""Stand-ins for time, disk and engine, driven by the test."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from memstore.errors import MemstoreError, NotReady
from memstore.types import Hits, SequenceResult, StepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from memstore.device import DeviceWorker
    from memstore.journal import Journal
    from memstore.seams import Buffer
    from memstore.types import StepBatch


T = TypeVar("T")
NO_HITS = Hits(row_splits=torch.zeros(1), positions=torch.empty(0), index=torch.empty(0), scores=None, arrays={})


class FakeClock:
    """A clock that stands until it is moved."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Moves the time."""
        self.now += seconds


class FakeDisk:
    """Files in a dict, some of them not synced yet. Threads may use different files of it at the same time: whatever
    looks at all of them looks at a copy of the names, which is made in one go.

    is_full: every write fails, after half of it. cannot_sync: every sync fails. kill() ends the process: what was
    written is there. power_off() ends the machine: of what was not synced, the disk has as much as `random` says, and
    maybe torn; what was removed may be there again, unless its folder was synced since.
    """

    def __init__(self, random: Random | None = None) -> None:
        self.files: dict[Path, bytes] = {}
        self.is_full = False
        self.cannot_sync = False
        self.num_syncs = 0
        self._random = random or Random(0)
        self._synced: dict[Path, bytes] = {}
        self._removed: dict[Path, bytes] = {}
        self._boot = 1
        self._held: set[Path] = set()

    def kill(self) -> None:
        """The process has ended, and its locks are free."""
        self._held.clear()

    def power_off(self) -> None:
        """The machine went down and is up again."""
        self.kill()
        self._boot += 1
        for path, content in self.files.items():
            kept = self._synced.get(path, b"")
            self.files[path] = kept + self._torn(content[len(kept) :])
        for path, content in self._removed.items():
            if path not in self.files and self._random.random() < 0.5:
                self.files[path] = content
        self._removed.clear()
        self._synced = dict(self.files)

    def _torn(self, unsynced: bytes) -> bytes:
        """What the disk has of bytes that were not synced: any length of them, and blocks that it never wrote."""
        content = bytearray(unsynced[: self._random.randint(0, len(unsynced))])
        if content and self._random.random() < 0.5:
            at = self._random.randrange(len(content))
            end = min(len(content), at + self._random.randint(1, 512))
            content[at:end] = bytes(end - at)
        return bytes(content)

    def sync(self, path: Path) -> None:
        """What a file has outlives the machine's power."""
        if self.cannot_sync:
            raise OSError(5, "Input/output error")
        self.num_syncs += 1
        if path in self.files:
            self._synced[path] = self.files[path]

    def add(self, path: Path, content: bytes) -> None:
        """Appends to a file; where the disk is full, half of it."""
        if self.is_full:
            self.files[path] += content[: len(content) // 2]
            raise OSError(28, "No space left on device")
        self.files[path] += content

    def boot_id(self) -> str:
        return f"boot {self._boot}"

    def create(self, path: Path) -> FakeAppendFile:
        if path in self.files:
            raise FileExistsError(17, "File exists", str(path))
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.files[path] = self._synced[path] = b""
        self._sync_names(path.parent)
        return FakeAppendFile(self, path)

    def scratch(self, path: Path) -> FakeAppendFile:
        if path in self.files:
            raise FileExistsError(17, "File exists", str(path))
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.files[path] = b""
        return FakeAppendFile(self, path)

    def open(self, path: Path) -> FakeReadFile:
        if path not in self.files:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return FakeReadFile(self.files[path])

    def truncate(self, path: Path, size: int) -> None:
        self.files[path] = self.files[path][:size]
        self.sync(path)

    def names(self, folder: Path) -> list[str]:
        depth = len(folder.parts)
        return sorted({path.parts[depth] for path in list(self.files) if folder in path.parents})

    def rename(self, source: Path, target: Path) -> None:
        if any(target in path.parents for path in list(self.files)):
            raise OSError(39, "Directory not empty", str(target))
        for files in (self.files, self._synced):
            for path in [path for path in list(files) if path == source or source in path.parents]:
                files[target / path.relative_to(source)] = files.pop(path)
        self._sync_names(target.parent)

    def remove_folder(self, path: Path) -> None:
        for each in [each for each in list(self.files) if path in each.parents]:
            self.files.pop(each, None)
            self._synced.pop(each, None)
        self._sync_names(path)

    def read(self, path: Path) -> bytes | None:
        return self.files.get(path)

    def replace(self, path: Path, content: bytes) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.files[path] = self._synced[path] = content
        self._sync_names(path.parent)

    def remove(self, path: Path) -> None:
        self.files.pop(path, None)
        if path in self._synced:
            self._removed[path] = self._synced.pop(path)

    def _sync_names(self, folder: Path) -> None:
        """What was removed from a folder does not come back."""
        self._removed = {path: content for path, content in list(self._removed.items()) if path.parent != folder}

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        if path in self._held:
            raise NotReady(f"{path} is held")
        self._held.add(path)
        try:
            yield
        finally:
            self._held.discard(path)


class HeldBuilds(Executor):
    """Runs nothing before it is told to, and then in the thread that tells."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def __len__(self) -> int:
        """How much waits."""
        return len(self._waiting)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        self._waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self, number: int | None = None) -> None:
        """Runs so many things, or all that wait, in the order in which they came."""
        for _ in range(len(self) if number is None else min(number, len(self))):
            future, call = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                future.set_result(call())


class FakeAppendFile:
    """A file of a FakeDisk that grows."""

    def __init__(self, disk: FakeDisk, path: Path) -> None:
        self._disk = disk
        self._path = path

    @property
    def size(self) -> int:
        return len(self._disk.files[self._path])

    def write(self, parts: Sequence[Buffer]) -> None:
        self._disk.add(self._path, b"".join(bytes(part) for part in parts))

    def sync(self) -> None:
        self._disk.sync(self._path)

    def truncate(self, size: int) -> None:
        self._disk.files[self._path] = self._disk.files[self._path][:size]

    def close(self) -> None:
        """Nothing is held."""


class FakeReadFile:
    """A file of a FakeDisk as it is now."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)

    def read_into(self, offset: int, target: memoryview) -> int:
        part = self._content[offset : offset + len(target)]
        target[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """Nothing is held."""


class Diligent:
    """Syncs at once; or, where `waits`, when it is told to."""

    def __init__(self, *, waits: bool = False) -> None:
        self.waits = waits
        self.asking: list[Journal] = []

    def ask(self, journal: Journal) -> None:
        if self.waits:
            self.asking.append(journal)
        else:
            journal.sync()

    def sync(self) -> None:
        """Syncs what has asked."""
        asking, self.asking = self.asking, []
        for journal in asking:
            journal.sync()


class FakeEngine:
    """Remembers how it was called; fails as it is told."""

    def __init__(self) -> None:
        self.calls: list[list[StepBatch]] = []
        self.failure: Exception | None = None
        self.refusals: dict[str, MemstoreError] = {}

    @property
    def joined(self) -> list[list[str]]:
        """The first sequence of each batch, call by call."""
        return [[batch.parts[0].sequence for batch in call] for call in self.calls]

    def step(
        self, batches: Sequence[StepBatch], carry: Callable[[int, Hits], None]
    ) -> list[StepResult | MemstoreError]:
        if self.failure is not None:
            raise self.failure
        self.calls.append(list(batches))
        return [self._outcome(at, batch, carry) for at, batch in enumerate(batches)]

    def settle(self, answer: Callable[[MemstoreError | None], None]) -> None:
        answer(None)

    def _outcome(self, at: int, batch: StepBatch, carry: Callable[[int, Hits], None]) -> StepResult | MemstoreError:
        try:
            if batch.retrieve is not None:
                carry(at, NO_HITS)
        except MemstoreError as error:
            return error
        return self.refusals.get(batch.parts[0].sequence) or _result(batch)


class FakeReply:
    """A reply that is what happened to the sequences. Its two failures are raised where they are due."""

    def __init__(self) -> None:
        self.carry_failure: Exception | None = None
        self.finish_failure: Exception | None = None
        self.is_discarded = False

    def carry(self, hits: Hits) -> None:
        if self.carry_failure is not None:
            raise self.carry_failure

    def finish(self, sequences: Sequence[SequenceResult]) -> tuple[SequenceResult, ...]:
        if self.finish_failure is not None:
            raise self.finish_failure
        return tuple(sequences)

    def discard(self) -> None:
        self.is_discarded = True


def _result(batch: StepBatch) -> StepResult:
    parts = [
        SequenceResult(epoch=1, as_of=0, live_begin=0, first_position=0, num_appended=p.num_rows) for p in batch.parts
    ]
    return StepResult(sequences=tuple(parts))


@contextmanager
def held(worker: DeviceWorker) -> Iterator[None]:
    """Keeps the device thread busy for the length of the block, so that what is submitted in it waits together."""
    begun, release = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        release.wait()

    busy = worker.control(wait)
    begun.wait()
    try:
        yield
    finally:
        release.set()
        busy.result()
