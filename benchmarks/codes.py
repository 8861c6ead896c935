"""How much faster is decode with a first pass over codes than exact decode, and what does it miss?

The rows are real hidden states (benchmarks/states.py), each sequence a stretch of text of its own, and the queries
those of the tokens behind it. On the host exact search and first passes come in turn. On a GPU each is the time of all
kernels of a retrieval, as benchmarks/gpu_search.py takes it, and is compared with reading the rows once.
"""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING, Protocol

import torch

from benchmarks.report import Report, interleaved
from benchmarks.states import DIM, many_states
from memstore.index.exact import ExactIndex
from memstore.search import SearchBatch
from memstore.slab import Slab
from memstore.types import FirstPass, MemorySpec

if TYPE_CHECKING:
    from collections.abc import Callable

TOP_K = 16
NUM_QUERIES = 8
LEAST_RECALL = 0.99
LEAST_RATIO = 3.0
MOST_FLOORS = 0.6
CODED = (FirstPass.INT8, FirstPass.INT4, FirstPass.INT2)
CASES = {
    "cpu": ((8, 16_384), (32, 16_384), (8, 65_536), (1, 65_536)),
    "cuda": ((32, 131_072), (32, 16_384), (8, 65_536)),
}
"""Sequences and rows of each."""

ROUNDS = 40


def filled(states: torch.Tensor, first_pass: FirstPass) -> Slab:
    """A slab whose places are full. states: (S, C, 256)."""
    num_sequences, capacity, _ = states.shape
    spec = MemorySpec(name="m", dim=DIM, capacity=capacity, max_sequences=num_sequences, first_pass=first_pass)
    slab = Slab(spec, states.device)
    cells = torch.arange(num_sequences * capacity, device=states.device)
    for rows, some in zip(torch.split(states.flatten(0, 1), 1 << 18), torch.split(cells, 1 << 18), strict=True):
        slab.write(slab.stage(rows[None], {}), some)
    return slab


def batch_of(slab: Slab, queries: torch.Tensor) -> SearchBatch:
    """queries: (S, n, 256)."""
    num_sequences, num, _ = queries.shape
    return SearchBatch(
        queries=queries.flatten(0, 1)[None].contiguous(),
        layers=(0,),
        places=tuple(range(num_sequences)),
        counts=(num,) * num_sequences,
        begins=(0,) * num_sequences,
        ends=(slab.capacity,) * num_sequences,
        top_k=TOP_K,
    )


def recall(want: torch.Tensor, found: torch.Tensor) -> float:
    """Share of the exact hits, (..., k) positions, that were found."""
    return (want[..., None] == found[..., None, :]).any(-1).float().mean().item()


def measure(case: tuple[int, int], report: Report, device: Device) -> None:
    """Adds the rows of one case."""
    num_sequences, capacity = case
    states = many_states(num_sequences * (capacity + NUM_QUERIES), device.device).view(num_sequences, -1, DIM)
    rows, queries = states[:, :capacity], states[:, capacity:]
    found = {kind: hits(rows, queries, kind) for kind in (FirstPass.ROWS, *CODED)}
    recalls = {kind: recall(found[FirstPass.ROWS], found[kind]) for kind in CODED}
    for kind, value in recalls.items():
        figure = f"recall@{TOP_K}, {kind.value}"
        report.add(device.name_of(case), figure, value, "ratio", goal=LEAST_RECALL, better="higher")
    enough = [kind for kind in CODED if recalls[kind] >= LEAST_RECALL]
    device.add_times(case, rows, queries, enough, report)


def hits(rows: torch.Tensor, queries: torch.Tensor, first_pass: FirstPass) -> torch.Tensor:
    """(Q, 16) positions."""
    slab, index = filled(rows, first_pass), ExactIndex()
    found = index.search(slab, batch_of(slab, queries))[0][0]
    index.close()
    return found


class Device(Protocol):
    """Where it is measured."""

    device: torch.device
    report: str

    def name_of(self, case: tuple[int, int]) -> str:
        """As other benchmarks name the case."""
        ...

    def add_times(
        self,
        case: tuple[int, int],
        rows: torch.Tensor,
        queries: torch.Tensor,
        enough: list[FirstPass],
        report: Report,
    ) -> None:
        """Adds what exact search and first passes take. enough: those of sufficient recall."""
        ...


class Host:
    """Searches for one query a sequence, in turn."""

    device, report = torch.device("cpu"), "codes"

    def name_of(self, case: tuple[int, int]) -> str:
        """As benchmarks/search.py does."""
        return f"{case[0]} x {case[1]} x {DIM} float16, decode"

    def add_times(
        self,
        case: tuple[int, int],
        rows: torch.Tensor,
        queries: torch.Tensor,
        enough: list[FirstPass],
        report: Report,
    ) -> None:
        """See Device."""
        kinds = (FirstPass.ROWS, *CODED)
        seconds = interleaved({kind.value: self._search(rows, queries, kind) for kind in kinds}, ROUNDS)
        name, exact = self.name_of(case), seconds[FirstPass.ROWS.value]
        for kind in kinds:
            report.add(name, f"search, {kind.value}", seconds[kind.value] * 1e3, "ms")
        for kind in CODED:
            report.add(name, f"exact / {kind.value}", exact / seconds[kind.value], "ratio", better="higher")
        best = min((seconds[kind.value] for kind in enough), default=exact)
        figure = f"exact / fastest of recall {LEAST_RECALL}"
        report.add(name, figure, exact / best, "ratio", goal=LEAST_RATIO if case[0] > 1 else None, better="higher")

    def _search(self, rows: torch.Tensor, queries: torch.Tensor, first_pass: FirstPass) -> Callable[[], object]:
        slab, index = filled(rows, first_pass), ExactIndex()
        batches = itertools.cycle([batch_of(slab, some) for some in queries.float().split(1, 1)])
        return lambda: index.search(slab, next(batches))


class Gpu:
    """All kernels of a retrieval for one query a sequence, as one graph, against reading the rows once."""

    device, report = torch.device("cuda"), "gpu-codes"

    def __init__(self, *, is_profiling: bool) -> None:
        from benchmarks import gpu_search  # which needs Triton

        self._tools, self._ceilings, self._is_profiling = gpu_search, gpu_search.ceilings(), is_profiling

    def name_of(self, case: tuple[int, int]) -> str:
        """As benchmarks/gpu_search.py does."""
        return f"{case[0]}x{case[1]}x1"

    def add_times(
        self,
        case: tuple[int, int],
        rows: torch.Tensor,
        queries: torch.Tensor,
        enough: list[FirstPass],
        report: Report,
    ) -> None:
        """See Device."""
        name, floor = self.name_of(case), self._ceilings.floor_s(self._tools.Case(*case, 1))
        report.add(name, "floor of the rows", floor * 1e6, "us")
        seconds = {}
        for kind in (FirstPass.ROWS, *CODED):
            kernels = self._tools.our_kernels(rows, queries[:, :1], kind)
            seconds[kind] = self._tools.device_seconds_of(kernels)
            if self._is_profiling:
                print(self._tools.kernels_of(kernels))
            report.add(name, f"on the device, {kind.value}", seconds[kind] * 1e6, "us")
            report.add(name, f"on the device / floor, {kind.value}", seconds[kind] / floor, "ratio")
        best = min((seconds[kind] for kind in enough), default=seconds[FirstPass.ROWS])
        goal = MOST_FLOORS if case == CASES["cuda"][0] else None
        report.add(name, f"fastest of recall {LEAST_RECALL} / floor", best / floor, "ratio", goal=goal)


def main() -> None:
    """Measures all cases, on a GPU where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first case")
    parser.add_argument("--profile", action="store_true", help="on a GPU: print what each kernel takes")
    parser.add_argument("--device", choices=list(CASES), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device: Device = Gpu(is_profiling=options.profile) if options.device == "cuda" else Host()
    report = Report(device.report)
    for case in CASES[options.device][: 1 if options.quick else None]:
        measure(case, report, device)
        report.write()  # what is there is not lost if the rest fails
    print(report.write())


if __name__ == "__main__":
    main()
