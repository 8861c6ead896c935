"""What comes of more requests than the device can serve: useful answers, their latency, and whose they are.

made up     the server's queue, admission, turns and joining before an engine that takes a stated time, in virtual time:
            the same on every machine. Poisson arrivals of fixed seeds; an answer within the patience is of use
real        the same with the search of this machine and its clock, arrivals at their time from one thread

Each with admission as it is, with no more than late calls dropped before the device, and with nothing: a queue without
end, first come first served, that knows no deadlines.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.report import RESULTS, Report
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
from tests.loading import Cost, Load, Source, Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from google.protobuf.message import Message

COST = Cost(call_s=0.0002, row_s=0.0008)
"""1,000 to 1,250 requests a second, by how many are joined."""
CAPACITY = 1000.0
PATIENCE_S = 0.05
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
KINDS = ("memstore", "late calls dropped", "nothing")
NAMES = {"memstore": "with admission", "late calls dropped": "late calls dropped only", "nothing": "without"}
Point = tuple[float, float]
"""Useful answers a second, and the 99th percentile of the latency of all answers, in seconds."""
DIM, ROWS, PIECE, SEQUENCES = 256, 131_072, 16_384, 4
"""A request reads 134 MB, so that asking costs little beside it."""


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


def run_made_up(kind: str, rates: dict[str, float], seconds: float) -> dict[str, Tally]:
    """What became of each tenant's requests, in virtual time."""
    sources = [
        Source(tenant=tenant, arrivals=poisson(rate, seconds, seed), patience_s=PATIENCE_S, tells=kind != "nothing")
        for seed, (tenant, rate) in enumerate(rates.items())
    ]
    load = Load(sources, None if kind == "memstore" else Boundless(), cost=COST)
    weaken(load.worker, kind)
    return load.run()


class Real:
    """Two tenants' memories on this machine, asked at their time."""

    def __init__(self, kind: str) -> None:
        self.clock = SystemClock()
        admission = Admission(QueueLimits(leaves_room=True)) if kind == "memstore" else Boundless()
        self.worker = DeviceWorker(torch.device("cpu"), admission, self.clock)
        weaken(self.worker, kind)
        self._tells = kind != "nothing"
        self._registry = Registry(NoCatalog(), self.worker, CapacityBudget(8 << 30), self.clock, 8)
        self._registry.load().result()
        self._service = Service(self._registry, 0.0)
        self._requests: dict[str, list[pb.RetrieveRequest]] = {}
        for tenant in ("good", "flood"):
            self._fill(tenant)

    def close(self) -> None:
        """Gives everything back."""
        self._registry.close()
        self.worker.close()

    def _fill(self, tenant: str) -> None:
        spec = MemorySpec(name="notes", dim=DIM, capacity=ROWS, max_sequences=SEQUENCES, dtype=torch.float32)
        self._registry.create(MemoryId(tenant, "notes"), spec, exist_ok=False).result()
        keys = torch.randn(1, PIECE, DIM, generator=torch.Generator().manual_seed(0))
        for number in range(SEQUENCES):
            part = pb.SequencePart(sequence=f"s{number}", num_rows=PIECE)
            append = pb.AppendRequest(memory="notes", sequences=[part], keys=_tensor(keys))
            for _ in range(ROWS // PIECE):
                self._call("Append", append, tenant, None).result()
        self._requests[tenant] = [
            pb.RetrieveRequest(
                memory="notes",
                sequences=[pb.SequencePart(sequence=f"s{number}", num_rows=1)],
                retrieve=pb.RetrieveOptions(top_k=16),
                keys=_tensor(keys[:, number : number + 1]),
            )
            for number in range(SEQUENCES)
        ]

    def _call(self, method: str, request: Message, tenant: str, deadline: float | None) -> Future[Message]:
        caller = Caller(tenant=tenant, plane=InlinePlane(MAX_MESSAGE_BYTES), deadline=deadline)
        return self._service.call(method, request, caller)

    def closed_loop(self, seconds: float) -> float:
        """Answers a second with four requests under way at all times."""
        begun, number = time.perf_counter(), 0
        under_way: list[Future[Message]] = []
        while time.perf_counter() - begun < seconds:
            while len(under_way) < SEQUENCES:
                under_way.append(self._call("Retrieve", self._requests["good"][number % SEQUENCES], "good", None))
                number += 1
            under_way.pop(0).result()
        done = number - len(under_way)
        elapsed = time.perf_counter() - begun
        for each in under_way:
            each.result()
        return done / elapsed

    def run(self, rates: dict[str, float], seconds: float, patience_s: float) -> dict[str, Tally]:
        """What became of each tenant's requests, which arrive at their time whatever became of those before."""
        tallies: dict[str, Tally] = defaultdict(Tally)
        coming = sorted(
            (at, tenant) for seed, (tenant, rate) in enumerate(rates.items()) for at in poisson(rate, seconds, seed)
        )
        begun, futures = self.clock.monotonic(), []
        for number, (at, tenant) in enumerate(coming):
            while (left := begun + at - self.clock.monotonic()) > 0:
                time.sleep(left)
            deadline = begun + at + patience_s if self._tells else None
            future = self._call("Retrieve", self._requests[tenant][number % SEQUENCES], tenant, deadline)
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


def _tensor(values: torch.Tensor) -> pb.Tensor:
    return pb.Tensor(dtype=pb.DATA_TYPE_FP32, shape=values.shape, data=values.contiguous().numpy().tobytes())


def point(tally: Tally, seconds: float) -> Point:
    """The figures of one run."""
    return tally.useful / seconds, float(np.quantile(tally.latencies, 0.99)) if tally.latencies else 0.0


def tell(report: Report, where: str, curves: dict[str, dict[float, Point]], patience_s: float) -> None:
    """Rows of one set of curves. Goals are for those that no other work on the machine can disturb."""
    for kind, curve in curves.items():
        case = f"{where}, {NAMES[kind]}"
        has_goal = kind == "memstore" and where == "made up"
        least, most = (0.8, 1.2) if has_goal else (None, None)
        ratio = curve[3.0][0] / max(goodput for goodput, _ in curve.values())
        report.add(case, "goodput at 3 x / peak", ratio, "ratio", goal=least, better="higher")
        report.add(case, "p99 at 3 x / patience", curve[3.0][1] / patience_s, "ratio", goal=most)
        for factor, (goodput, p99) in curve.items():
            report.add(case, f"goodput at {factor:g} x", goodput, "1/s", better="higher")
            report.add(case, f"p99 at {factor:g} x", 1e3 * p99, "ms")


def tell_share(report: Report, case: str, kind: str, tally: Tally) -> None:
    """The row of a tenant that stays within its share beside a flood."""
    goal = 0.8 if kind == "memstore" and case.startswith("made up") else None
    share = tally.useful / tally.offered
    report.add(f"{case}, {NAMES[kind]}", "well-behaved tenant / its share", share, "ratio", goal=goal, better="higher")


def made_up(report: Report, seconds: float) -> dict[str, dict[float, Point]]:
    """Curves in virtual time, and a tenant at 0.45 of the capacity beside one that offers five times all of it."""
    curves: dict[str, dict[float, Point]] = {}
    for kind in KINDS:
        curves[kind] = {
            factor: point(run_made_up(kind, {"t": factor * CAPACITY}, seconds)["t"], seconds) for factor in FACTORS
        }
    tell(report, "made up", curves, PATIENCE_S)
    for kind in KINDS:
        tallies = run_made_up(kind, {"good": 0.45 * CAPACITY, "flood": 5 * CAPACITY}, seconds)
        tell_share(report, "made up, flood of 5 x", kind, tallies["good"])
    return curves


def real(report: Report, seconds: float, factors: Sequence[float]) -> dict[str, dict[float, Point]]:
    """The same on this machine; patience is forty times what a request takes."""
    servers = {kind: Real(kind) for kind in KINDS}
    capacity = max(servers[kind].closed_loop(seconds / 2) for kind in KINDS)
    patience_s = 40 / capacity
    report.add("real", "capacity, four under way", capacity, "1/s", better="higher")
    curves: dict[str, dict[float, Point]] = {kind: {} for kind in KINDS}
    for factor in factors:
        for kind, server in servers.items():
            tally = server.run({"good": factor * capacity}, seconds, patience_s)["good"]
            curves[kind][factor] = point(tally, seconds)
    tell(report, "real", curves, patience_s)
    for kind, server in servers.items():
        tallies = server.run({"good": 0.4 * capacity, "flood": 3 * capacity}, seconds, patience_s)
        tell_share(report, "real, flood of 3 x", kind, tallies["good"])
        server.close()
    return curves


def draw(made: dict[str, dict[float, Point]], measured: dict[str, dict[float, Point]]) -> None:
    """Offered load against goodput and latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    colours = dict(zip(KINDS, ("#2563ae", "#d1783c", "#8a8f98"), strict=True))
    for column, (title, curves) in enumerate((("made up, virtual time", made), ("this machine", measured))):
        for kind, curve in curves.items():
            factors = list(curve)
            style = {"label": NAMES[kind], "color": colours[kind], "marker": "o", "markersize": 4}
            axes[0, column].plot(factors, [goodput for goodput, _ in curve.values()], **style)
            axes[1, column].plot(factors, [1e3 * p99 for _, p99 in curve.values()], **style)
        axes[0, column].set(title=title, ylabel="useful answers / s", ylim=(0, None), xscale="log")
        axes[1, column].set(xlabel="offered load / capacity", ylabel="p99 of answers, ms", xscale="log", yscale="log")
        for each in axes[:, column]:
            each.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            each.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False)
    figure.savefig(RESULTS / "overload.png", dpi=130)
    pyplot.close(figure)


def main() -> int:
    """Measures, draws, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter runs, fewer loads")
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    report = Report("overload")
    made = made_up(report, 1.0 if options.quick else 4.0)
    measured = real(report, 2.0 if options.quick else 4.0, (0.5, 1.0, 1.5, 3.0))
    draw(made, measured)
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
