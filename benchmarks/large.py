"""Large memories: what do generations behind an exact tail find, how fast, and do their builds hold up retrieval?

The rows are real hidden states (benchmarks/states.py), moved a little where there is too little text for so many;
the queries are states further on in the text. Each kind of
index is filled by appends of 16,384 rows while a query is retrieved every 3 ms and a bit, until the last build has
ended. A pause is how much longer a retrieval takes than the median of those around it (what is not built yet is
scanned, which is no pause), less what it waited for a core while other processes had one (benchmarks/cores.py). What a
build does stays a pause: that it has the core or a lock, or that it has a lock and no core. "As it was" is the longest
with nothing taken off. The longest without a build is measured in the same way afterwards, and at the end that while a
quarter of the rows is appended once more, so that generations are dropped. In between the full memory is
measured beside plain FAISS: one index of the same type over all rows, built with all of the device, with as many
lists and probes for its size as ours have for theirs, in turn with ours. All of a retrieval is in ours: scores made
afresh from the stored rows, and their gather.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks import cores
from benchmarks.plain_faiss import plain_index
from benchmarks.report import Report, interleaved
from benchmarks.states import DIM, repeated, states_of_text
from memstore import heap
from memstore.errors import MemstoreError
from memstore.index import build_thread, prepare
from memstore.index.settings import filled_in
from memstore.memory import Memory
from memstore.types import IndexKind, IndexSettings, MemorySpec, RetrieveOptions, SequencePart, StepBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memstore.types import IndexCounts

TOP_K = 16
APPENDED_ROWS = 16_384
NUM_QUERIES = 1024
BATCH = 64
ROUNDS = 9
USUAL_S = 5.0
PACE_S = 0.003
ROUNDING = 1e-5
AROUND = 25
RETRIEVALS_AN_APPEND = 4
KINDS = (IndexKind.FAISS_IVF_FLAT, IndexKind.FAISS_IVF_PQ, IndexKind.FAISS_CAGRA)
MOST_READ = {"cuda": 10_000_000, "cpu": 262_144}
"""States of text that are computed, by type of device: the host takes minutes for a million."""

LARGEST_PAUSE_MS = 5.0
LEAST_RECALL = 0.95


@dataclass(frozen=True, slots=True)
class Data:
    """rows: (N, 256) float16, in the order of appending. queries: (1024, 256) float16. best: (1024, 16) positions."""

    rows: torch.Tensor
    queries: torch.Tensor
    best: torch.Tensor


class Timed(NamedTuple):
    """A retrieval. lost_s: what it waited for a core while others had one. others_s: time of cores that they had."""

    seconds: float
    lost_s: float
    others_s: float


class Filled:
    """A memory, and the times of the retrievals that were made in it."""

    def __init__(self, spec: MemorySpec, data: Data) -> None:
        builds = build_thread()
        self.memory = Memory(spec, data.rows.device, new_epoch=itertools.count(1).__next__, builds=builds)
        builds.submit(int).result()  # what is done once, before the first build, is over
        self._data = data
        self._asked = 0
        if data.rows.is_cuda:
            torch.cuda.synchronize()

    def append(self, rows: torch.Tensor) -> None:
        """Appends some rows."""
        part = SequencePart(sequence="text", num_rows=len(rows))
        (result,) = self.memory.step([StepBatch(parts=(part,), layers=(0,), keys=rows[None], append=True)])
        assert not isinstance(result, MemstoreError)

    def found(self, queries: torch.Tensor) -> torch.Tensor:
        """(n, 16) positions on the host, as a client gets them: every row is gathered, and the device has done."""
        part = SequencePart(sequence="text", num_rows=len(queries))
        step = StepBatch(parts=(part,), layers=(0,), keys=queries[None], retrieve=RetrieveOptions(top_k=TOP_K))
        (result,) = self.memory.step([step])
        assert not isinstance(result, MemstoreError)
        assert result.hits is not None
        index = result.hits.index[0, :, :, 0].long()
        return torch.where(index < 0, -1, result.hits.positions[index]).cpu()

    def timed(self) -> Timed:
        """A retrieval for the next query."""
        number = self._asked % NUM_QUERIES
        self._asked += 1
        before = cores.now()
        begun = time.perf_counter()
        self.found(self._data.queries[number : number + 1])
        seconds = time.perf_counter() - begun
        after = cores.now()
        return Timed(seconds, after.lost_s(before), after.others_s(before))

    def usual(self) -> list[Timed]:
        """Each retrieval in some seconds without a build."""
        end = time.perf_counter() + USUAL_S
        times = []
        while time.perf_counter() < end:
            times.append(self.timed())
            time.sleep(PACE_S)
        return times

    def fill(self, rows: torch.Tensor) -> list[Timed]:
        """Appends rows; each retrieval while a build was under way."""
        times: list[Timed] = []
        for some in torch.split(rows, APPENDED_ROWS):
            self.append(some)
            times += itertools.islice(self._while_building(), RETRIEVALS_AN_APPEND)
        times += self._while_building()
        return times

    def _while_building(self) -> Iterator[Timed]:
        """Retrieves while a build is under way, and then does nothing for a while, as a model computes elsewhere."""
        while self.counts().builds_under_way > 0:
            yield self.timed()
            time.sleep(PACE_S)

    def counts(self) -> IndexCounts:
        """Of the index."""
        counts = self.memory.counts().index
        assert counts is not None
        return counts

    def free(self) -> None:
        """Gives everything back."""
        self.memory.free()
        self.memory.join()


def recall(found: torch.Tensor, data: Data) -> float:
    """Share of 16 that are no farther than the true sixteenth: code repeats itself, and so many rows are equal."""

    def distances(positions: torch.Tensor) -> torch.Tensor:
        rows = data.rows[positions.clamp(min=0).to(data.rows.device)].float()
        return (rows - data.queries.float()[:, None]).square().sum(-1).cpu().masked_fill(positions < 0, torch.inf)

    return (distances(found) <= distances(data.best[:, -1:]) * (1 + ROUNDING)).float().mean().item()


def load(num_rows: int, device: torch.device) -> Data:
    """States of as much text as it takes, and what exact search finds."""
    states = states_of_text(min(num_rows, MOST_READ[device.type]) + NUM_QUERIES, device)
    data = Data(repeated(states[:-NUM_QUERIES], num_rows), states[-NUM_QUERIES:], torch.empty(0))
    exact = Filled(_spec(num_rows, IndexKind.EXACT), data)
    for rows in torch.split(data.rows, APPENDED_ROWS):
        exact.append(rows)
    best = torch.cat([exact.found(queries) for queries in torch.split(data.queries, BATCH)])
    exact.free()
    return replace(data, best=best)


def _spec(num_rows: int, kind: IndexKind) -> MemorySpec:
    return MemorySpec(name="m", dim=DIM, capacity=num_rows, index=kind)


def measure(kind: IndexKind, data: Data, report: Report) -> None:
    """Adds the rows of one kind."""
    num_rows, device = len(data.rows), data.rows.device
    case = f"{num_rows} x {DIM} float16, {kind.value}"
    ours = Filled(_spec(num_rows, kind), data)
    ours.append(data.rows[:1])
    ours.timed()
    during = ours.fill(data.rows[1:])
    report.add(case, "build time", ours.counts().build_seconds, "s")
    add_pauses(case, during, ours.usual(), report)
    begun = time.perf_counter()
    plain = plain_index(kind, data.rows, filled_in(kind, IndexSettings(), 8 * num_rows, DIM))
    report.add(case, "build time, plain FAISS", time.perf_counter() - begun, "s")
    report.add(case, "generations", ours.counts().num_generations, "")
    found = torch.cat([ours.found(queries) for queries in torch.split(data.queries, BATCH)])
    report.add(case, f"recall@{TOP_K}", recall(found, data), "ratio", goal=LEAST_RECALL, better="higher")
    report.add(case, f"recall@{TOP_K}, plain FAISS", recall(plain(data.queries), data), "ratio", better="higher")
    exact = Filled(_spec(num_rows, IndexKind.EXACT), data)
    for rows in torch.split(data.rows, APPENDED_ROWS):
        exact.append(rows)
    for num in (1, BATCH):
        add_speed(case, num, {"memstore": ours.found, "plain FAISS": plain, "exact": exact.found}, data, report)
    again = pauses(ours.fill(data.rows[: num_rows // 4]))
    report.add(case, "longest pause, generations dropped too", again[-1] * 1e3, "ms", goal=LARGEST_PAUSE_MS)
    ours.free()
    exact.free()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def pauses(times: list[Timed]) -> list[float]:
    """How much longer than the median of those around it each took, less what it lost to others; the shortest first."""
    return sorted(pause - each.lost_s for pause, each in zip(_as_they_were(times), times, strict=True))


def _as_they_were(times: list[Timed]) -> list[float]:
    """How much longer than the median of those around it each took."""
    seconds = [each.seconds for each in times]
    around = [statistics.median(seconds[max(at - AROUND, 0) : at + AROUND + 1]) for at in range(len(seconds))]
    return [each - usual for each, usual in zip(seconds, around, strict=True)]


def add_pauses(case: str, during: list[Timed], usual: list[Timed], report: Report) -> None:
    """The longest pauses, with builds and without, and what others had of the cores meanwhile."""
    report.add(case, "retrievals while building", len(during), "", better="higher")
    for figure, times in (("retrieval", usual), ("retrieval while building", during)):
        report.add(case, f"{figure}, median", statistics.median(each.seconds for each in times) * 1e3, "ms")
    report.add(case, "longest pause, no build", pauses(usual)[-1] * 1e3, "ms")
    report.add(case, "longest pause, no build, as it was", max(_as_they_were(usual)) * 1e3, "ms")
    report.add(case, "pause while building, 99%", pauses(during)[len(during) * 99 // 100] * 1e3, "ms")
    report.add(case, "longest pause while building", pauses(during)[-1] * 1e3, "ms", goal=LARGEST_PAUSE_MS)
    report.add(case, "longest pause while building, as it was", max(_as_they_were(during)) * 1e3, "ms")
    others = sum(each.others_s for each in during) / sum(each.seconds for each in during)
    report.add(case, "cores that others had while building", others, "")


def add_speed(
    case: str, num: int, searches: dict[str, Callable[[torch.Tensor], object]], data: Data, report: Report
) -> None:
    """Queries a second of each search, `num` queries at a time, called in turn."""
    queries = itertools.cycle(torch.split(data.queries, num))

    def once(search: Callable[[torch.Tensor], object]) -> Callable[[], object]:
        return lambda: search(next(queries))

    seconds = interleaved({name: once(search) for name, search in searches.items()}, ROUNDS)
    for name, value in seconds.items():
        report.add(case, f"queries/s, {num} at a time, {name}", num / value, "1/s", better="higher")
    for name in ("exact", "plain FAISS"):
        report.add(case, f"time / {name}, {num} at a time", seconds["memstore"] / seconds[name], "ratio")


def case(text: str) -> tuple[int, IndexKind]:
    """ROWS:KIND, as 1000000:faiss_ivf_flat."""
    num_rows, kind = text.split(":")
    return int(num_rows), IndexKind(kind)


def main() -> None:
    """Measures each kind at each size; on a GPU where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="65,536 rows")
    parser.add_argument("--cases", type=case, nargs="+", help="as 1000000:faiss_ivf_flat; each size after the other")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after so many no further case is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    heap.tune()  # as a server does it, and as it has all compiled that can be
    prepare(device)
    if device.type == "cuda":  # as the thread of a server that retrieves
        torch.cuda.set_stream(torch.cuda.Stream(priority=-1))  # type: ignore[no-untyped-call]
    sizes = [65_536] if options.quick else [1_000_000, 10_000_000] if device.type == "cuda" else [131_072]
    cases = options.cases or list(itertools.product(sizes, KINDS))
    report = Report("gpu-large" if device.type == "cuda" else "large")
    last = time.monotonic() + options.seconds
    data = None
    for num_rows, kind in cases:
        if time.monotonic() > last:
            print(f"no time left for {num_rows} x {DIM}, {kind.value}")
            continue
        if data is None or len(data.rows) != num_rows:
            data = None  # before there are others
            data = load(num_rows, device)
            gc.collect()  # what the model's libraries left: a collection that comes upon it takes a third of a second
            gc.freeze()
        begun = time.monotonic()
        try:
            measure(kind, data, report)
        finally:
            report.write()  # what is there is not lost if the rest takes too long
        print(f"{time.monotonic() - begun:.0f} s", flush=True)
    print(report.write())


if __name__ == "__main__":
    main()
