"""A device under load in virtual time: the real queue, admission and joining, before an engine that is made up.

Nothing here waits or measures: the same arrivals give the same outcome, on any machine.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from memstore.admission import Admission, QueueLimits
from memstore.device import DeviceWorker
from memstore.errors import Expired, MemstoreError, Overloaded
from memstore.jobs import StepJob, Ticket
from memstore.types import RetrieveOptions, SequencePart, StepBatch
from tests.fakes import FakeClock, FakeEngine, FakeReply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future

    from memstore.types import Hits, SequenceResult, StepResult

    Answer = Future[tuple[SequenceResult, ...]]

OPTIONS = RetrieveOptions(top_k=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one joined step takes: call_s, and row_s for each of its requests."""

    call_s: float = 0.0002
    row_s: float = 0.0001


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Requests of one tenant. sequences: over which they go, in turn; requests of one sequence cannot be joined.

    patience_s: how long after its arrival an answer is of use. tells: whether the server is told so, as a deadline.
    """

    tenant: str
    arrivals: Sequence[float]
    patience_s: float
    sequences: int = 64
    num_bytes: int = 1024
    tells: bool = True


@dataclass(slots=True)
class Tally:
    """What became of one tenant's requests. latencies: of all that were answered, in seconds."""

    offered: int = 0
    useful: int = 0
    refused: int = 0
    expired: int = 0
    latencies: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    order: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))


class CostlyEngine(FakeEngine):
    """Takes virtual time, in which what arrives meanwhile is queued at its own moment."""

    def __init__(self, load: Load, cost: Cost) -> None:
        super().__init__()
        self._load = load
        self._cost = cost

    def step(
        self, batches: Sequence[StepBatch], carry: Callable[[int, Hits], None]
    ) -> list[StepResult | MemstoreError]:
        self._load.pass_time(self._cost.call_s + self._cost.row_s * len(batches))
        return super().step(batches, carry)


class Load:
    """One run. Arrivals are offered at their time, to a worker that is served by the thread that runs this."""

    def __init__(
        self, sources: Iterable[Source], admission: Admission | None = None, *, cost: Cost | None = None
    ) -> None:
        self.clock = FakeClock(0.0)
        self.admission = admission or Admission(QueueLimits(leaves_room=True))
        self.worker = DeviceWorker(torch.device("cpu"), self.admission, self.clock, has_thread=False)
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        self.longest = 0
        self._cost = cost or Cost()
        self._engines: dict[str, CostlyEngine] = {}
        self._numbers = itertools.count()
        self._coming = [(at, next(self._numbers), source) for source in sources for at in source.arrivals]
        heapq.heapify(self._coming)

    def run(self) -> dict[str, Tally]:
        """Until every request has been answered or refused."""
        while True:
            if not self.worker.serve(waits=False):
                if not self._coming:
                    break
                self.pass_time(self._coming[0][0] - self.clock.now)
        self.worker.close()
        assert self.admission.num_requests == 0
        return self.tallies

    def pass_time(self, seconds: float) -> None:
        """Moves the clock, and offers what arrives meanwhile."""
        end = self.clock.now + seconds
        while self._coming and self._coming[0][0] <= end:
            at, number, source = heapq.heappop(self._coming)
            self.clock.now = max(self.clock.now, at)
            self.offer(source, number)
        self.clock.now = end

    def offer(self, source: Source, number: int = 0) -> None:
        """Offers one request of a source now."""
        tally = self.tallies[source.tenant]
        try:
            self._submit(source, number, tally)
        except Overloaded as error:
            tally.refused += 1
            tally.delays.append(error.retry_delay_s)
        self.longest = max(self.longest, self.admission.num_requests)

    def engine(self, tenant: str) -> CostlyEngine:
        """What serves a tenant."""
        return self._engines.setdefault(tenant, CostlyEngine(self, self._cost))

    def _submit(self, source: Source, number: int, tally: Tally) -> None:
        now, sequence = self.clock.now, f"s{tally.offered % source.sequences}"
        tally.offered += 1
        part = SequencePart(sequence=sequence, num_rows=1, seq=number)
        batch = StepBatch(parts=(part,), layers=(0,), keys=torch.zeros(1, 1, 1), retrieve=OPTIONS, append=False)
        ticket = Ticket(
            tenant=source.tenant,
            num_bytes=source.num_bytes,
            deadline=now + source.patience_s if source.tells else None,
            request_id="r",
        )
        job = StepJob(ticket, "notes", self.engine(source.tenant), lambda: batch, FakeReply())
        answer = self.worker.submit(job)
        answer.add_done_callback(lambda done: self._answered(tally, sequence, now, source.patience_s, done))
        tally.order[sequence].append(number)

    def _answered(self, tally: Tally, sequence: str, began: float, patience_s: float, answer: Answer) -> None:
        if isinstance(answer.exception(), Expired):
            tally.expired += 1
            return
        latency = self.clock.now - began
        tally.latencies.append(latency)
        tally.useful += latency <= patience_s


def every(seconds: float, until: float, begin: float = 0.0) -> list[float]:
    """Arrivals that are so far apart."""
    return [begin + seconds * n for n in range(int((until - begin) / seconds))]
