"""Stand-ins for time, disk and engine, driven by the test."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from memstore.errors import MemstoreError, NotReady
from memstore.types import Hits, SequenceResult, StepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from memstore.device import DeviceWorker
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
    """Files in a dict. `is_full` makes every write fail."""

    def __init__(self) -> None:
        self.files: dict[Path, bytes] = {}
        self.is_full = False
        self._held: set[Path] = set()

    def read(self, path: Path) -> bytes | None:
        return self.files.get(path)

    def replace(self, path: Path, content: bytes) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.files[path] = content

    def remove(self, path: Path) -> None:
        self.files.pop(path, None)

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
