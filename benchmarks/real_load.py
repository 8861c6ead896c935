"""Real: two tenants' memories on a device, asked at their time, beside what the device can do at that time.

A machine that others share is slower in one second than in the next. So what is offered, and what comes of it, is told
in what the same requests take just before and just after, one after another without a pause.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import torch

from memstore.admission import Admission, CapacityBudget, QueueLimits
from memstore.catalog import MemoryId, NoCatalog
from memstore.device import DeviceWorker
from memstore.errors import Expired, MemstoreError, Overloaded
from memstore.plane import InlinePlane
from memstore.registry import Registry
from memstore.seams import SystemClock
from memstore.service import Caller, Service
from memstore.types import MemorySpec
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import MAX_MESSAGE_BYTES
from tests.loading import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from google.protobuf.message import Message

DIM, ROWS, PIECE, SEQUENCES = 256, 131_072, 16_384, 4
"""A request reads 134 MB, so that asking costs little beside it."""
TENANTS = ("good", "flood")
PATIENCE = 40.0
"""How many times as long as a request takes its answer is of use."""
PROBE_S, SETTLE_S, WINDOW_S = 0.4, 0.8, 2.0
"""How long it is measured what the device can do; how long is waited until queues are as they stay; what is counted."""


class Boundless(Admission):
    """Refuses nobody."""

    def __init__(self) -> None:
        super().__init__(QueueLimits(max_requests=1 << 40, max_bytes=1 << 60))


def weaken(worker: DeviceWorker, kind: str) -> None:
    """Takes away what a kind does not have: late calls are not refused, and tenants do not take turns."""
    if kind == "memstore":
        return
    put = worker._turns.put
    worker._late_s = lambda _: 0.0  # type: ignore[assignment, method-assign]
    worker._turns.put = lambda _, job: put("all", job)  # type: ignore[assignment, method-assign]


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrivals at random, so many a second on the average."""
    random, now, arrivals = Random(seed), 0.0, []
    while (now := now + random.expovariate(rate)) < seconds:
        arrivals.append(now)
    return arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What became of the requests. capacity: answers a second that the device can give. patience_s: of each."""

    capacity: float
    patience_s: float
    tallies: Mapping[str, Tally]

    @property
    def goodput(self) -> float:
        """Useful answers of all tenants, as a share of what can be given."""
        return sum(tally.useful for tally in self.tallies.values()) / WINDOW_S / self.capacity

    @property
    def latencies(self) -> list[float]:
        """Of all answers, in patience."""
        return [latency / self.patience_s for tally in self.tallies.values() for latency in tally.latencies]


class Real:
    """Two tenants' memories on this machine, asked at their time."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.clock = SystemClock()
        admission = Admission(QueueLimits(leaves_room=True)) if kind == "memstore" else Boundless()
        self.worker = DeviceWorker(device, admission, self.clock)
        weaken(self.worker, kind)
        self._tells = kind != "nothing"
        self._registry = Registry(NoCatalog(), self.worker, CapacityBudget(8 << 30), self.clock, 8)
        self._registry.load().result()
        self.service = Service(self._registry, 0.0)
        for tenant in TENANTS:
            self._fill(tenant)
        self._requests = [request(number) for number in range(SEQUENCES)]

    def close(self) -> None:
        """Gives everything back."""
        self._registry.close()
        self.worker.close()

    def _fill(self, tenant: str) -> None:
        spec = MemorySpec(name="notes", dim=DIM, capacity=ROWS, max_sequences=SEQUENCES, dtype=torch.float32)
        self._registry.create(MemoryId(tenant, "notes"), spec, exist_ok=False).result()
        for number in range(SEQUENCES):
            part = pb.SequencePart(sequence=f"s{number}", num_rows=PIECE)
            append = pb.AppendRequest(memory="notes", sequences=[part], keys=_keys(PIECE))
            for _ in range(ROWS // PIECE):
                self._call("Append", append, tenant, None).result()

    def _call(self, method: str, request: Message, tenant: str, deadline: float | None) -> Future[Message]:
        caller = Caller(tenant=tenant, plane=InlinePlane(MAX_MESSAGE_BYTES), deadline=deadline)
        return self.service.call(method, request, caller)

    def closed_loop(self, seconds: float) -> float:
        """Answers a second with four requests under way at all times."""
        begun, number = time.perf_counter(), 0
        under_way: list[Future[Message]] = []
        while time.perf_counter() - begun < seconds:
            while len(under_way) < SEQUENCES:
                under_way.append(self._call("Retrieve", self._requests[number % SEQUENCES], "good", None))
                number += 1
            under_way.pop(0).result()
        done = number - len(under_way)
        elapsed = time.perf_counter() - begun
        for each in under_way:
            each.result()
        return done / elapsed

    def window(self, factors: Mapping[str, float], seed: int) -> Window:
        """Offers each tenant's factor of what the device can do now."""
        before = self.closed_loop(PROBE_S)
        tallies = self._run({tenant: factor * before for tenant, factor in factors.items()}, PATIENCE / before, seed)
        after = self.closed_loop(PROBE_S)
        return Window(capacity=(before + after) / 2, patience_s=PATIENCE / before, tallies=tallies)

    def _run(self, rates: Mapping[str, float], patience_s: float, seed: int) -> dict[str, Tally]:
        """What became of each tenant's requests, which arrive at their time whatever became of those before."""
        tallies: dict[str, Tally] = defaultdict(Tally)
        ends = SETTLE_S + WINDOW_S
        coming = sorted(
            (at, tenant)
            for number, (tenant, rate) in enumerate(rates.items())
            for at in poisson(rate, ends, seed + number)
        )
        begun, futures = self.clock.monotonic(), []
        for number, (at, tenant) in enumerate(coming):
            while (left := begun + at - self.clock.monotonic()) > 0:
                time.sleep(left)
            deadline = begun + at + patience_s if self._tells else None
            future = self._call("Retrieve", self._requests[number % SEQUENCES], tenant, deadline)
            if at >= SETTLE_S:
                future.add_done_callback(self._counted(tallies[tenant], begun + at, patience_s))
            futures.append(future)
        for future in futures:
            future.exception()
        return tallies

    def _counted(self, tally: Tally, began: float, patience_s: float) -> Callable[[Future[Message]], None]:
        tally.offered += 1

        def count(done: Future[Message]) -> None:
            error = done.exception()
            if isinstance(error, Overloaded):
                tally.refused += 1
            elif isinstance(error, Expired):
                tally.expired += 1
            elif isinstance(error, MemstoreError):
                raise error
            else:
                tally.latencies.append(self.clock.monotonic() - began)
                tally.useful += tally.latencies[-1] <= patience_s

        return count


def request(sequence: int, num_queries: int = 1) -> pb.RetrieveRequest:
    """A retrieval from one sequence."""
    return pb.RetrieveRequest(
        memory="notes",
        sequences=[pb.SequencePart(sequence=f"s{sequence}", num_rows=num_queries)],
        retrieve=pb.RetrieveOptions(top_k=16),
        keys=_keys(num_queries),
    )


def _keys(num_rows: int) -> pb.Tensor:
    values = torch.randn(1, num_rows, DIM, generator=torch.Generator().manual_seed(0))
    return pb.Tensor(dtype=pb.DATA_TYPE_FP32, shape=values.shape, data=values.numpy().tobytes())
