"""How far is a whole exact retrieval on a GPU from reading the rows once, and from the ways around it?

All work is in ours: search, scores, windows, distinct rows, their gather. Rivals only search: torch (bmm and topk over
all sequences at once, a few at a time where the scores would fill the memory), `faiss.knn_gpu` once a sequence, the
cache of the `neurocache` package and the kNN memory of `memorizing-transformers-pytorch` where they are installed. The
floor is the larger of the stored bytes over the bandwidth of a large copy and the operations over the rate of a large
fp16 product, both measured in the same run.

"memstore" is one step of the engine as the device thread does it, timed from its call to the reply on the device;
"standing" is what a decode loop does instead, of one query a sequence: it fills in its queries and replays its graph,
beside the device thread; "on the device" is the time that the kernels take there, replayed as one CUDA graph.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.knn_memory import NAME, knn_memory_search
from benchmarks.report import RESULTS, Report
from memstore.gpu import few, launch
from memstore.gpu.coded import reads_codes
from memstore.gpu.rings import tables
from memstore.gpu.tuning import scan_shape
from memstore.memory import Memory
from memstore.search import SearchBatch
from memstore.slab import Slab
from memstore.standing import Guests, Standing
from memstore.types import KEY, FirstPass, MemorySpec, RetrieveOptions, SequencePart, StepBatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from memstore.repeated import Repeated

DIM = 256
OPTIONS = RetrieveOptions(top_k=16, window_after=1)
MOST_ROWS_OF_NEUROCACHE = 600_000
ROUNDS = 9
WARM_UP = 3
BUSY_CYCLES = 2_000_000
"""Of the device's clock: about a millisecond, many times what a host needs to launch a graph unless it is held up."""
MOST_BUSY_CYCLES = BUSY_CYCLES << 7
OURS, STANDING, ON_DEVICE = "memstore", "memstore, standing", "memstore, on the device"


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences of `capacity` live rows with `num_queries` queries each. goal: in floors, or in microseconds."""

    num_sequences: int
    capacity: int
    num_queries: int
    goal: float | None = None
    goal_us: float | None = None

    def __str__(self) -> str:
        return f"{self.num_sequences}x{self.capacity}x{self.num_queries}"


GOALS = (
    Case(32, 131_072, 1, goal=1.15),
    Case(32, 16_384, 1, goal=1.6),
    Case(1, 131_072, 1, goal_us=45),
    Case(32, 65_536, 512, goal=2.5),
    Case(8, 65_536, 2048, goal=2.5),
)
BY_CAPACITY = tuple(Case(32, capacity, 1) for capacity in (1024, 4096, 65_536))
BY_SEQUENCES = tuple(Case(number, 65_536, 1) for number in (1, 4, 8, 64))
BY_QUERIES = tuple(Case(8, 65_536, number) for number in (1, 8, 32, 128, 512))


@dataclass(frozen=True, slots=True)
class Ceilings:
    """bytes_per_s: of a device copy, bytes read and written. flops: operations a second of an fp16 product."""

    bytes_per_s: float
    flops: float

    def floor_s(self, case: Case) -> float:
        """The least time that a case can take."""
        rows = case.num_sequences * case.capacity
        return max(rows * DIM * 2 / self.bytes_per_s, 2 * rows * case.num_queries * DIM / self.flops)


def seconds_of(functions: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each function with the device done, all called in turn once a round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + WARM_UP):
        for name, function in functions.items():
            torch.cuda.synchronize()
            begun = time.perf_counter()
            function()
            torch.cuda.synchronize()
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What `run` launches, as one CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def clock_mhz(run: Callable[[], object], seconds: float) -> float | None:
    """The clock of the multiprocessors while they do what `run` launches, which takes `seconds`; None if not known."""
    graph = captured(run)
    for _ in range(int(1.0 / seconds)):  # nvidia-smi takes some tenths of a second
        graph.replay()
    gpu = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    query = ["nvidia-smi", gpu, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
        return float(said)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    finally:
        torch.cuda.synchronize()


def device_seconds_of(run: Callable[[], object], rounds: int = 25) -> float:
    """Median seconds between two events around a CUDA graph of what `run` launches.

    The device is kept busy until all of that is queued, so that what the host takes to launch it is no part of it. A
    round in which the device was done being busy by then, since the host was held up, does not count, and it is kept
    busy for twice as long from then on. Raises TimeoutError where that does not help.
    """
    graph, cycles = captured(run), BUSY_CYCLES
    times: list[float] = []
    while len(times) < rounds + WARM_UP:
        torch.cuda._sleep(cycles)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        was_held_up = begin.query()
        end.synchronize()
        if was_held_up:
            cycles *= 2
            if cycles > MOST_BUSY_CYCLES:
                raise TimeoutError("the host cannot queue a graph while the device is kept busy for it")
        else:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[WARM_UP:])


def kernels_of(run: Callable[[], object], rounds: int = 10) -> str:
    """What each kernel of `run` takes, launched one by one: where the time of a case goes."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    return str(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=40))


def ceilings() -> Ceilings:
    """Measures the device."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target, square = torch.empty_like(source), torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    found = seconds_of({"copy": lambda: target.copy_(source), "product": lambda: square @ square})
    return Ceilings(2 * source.numel() / found["copy"], 2 * 8192**3 / found["product"])


def measure(case: Case, device: Ceilings, report: Report, *, has_rivals: bool) -> None:
    """Adds the rows of one case."""
    rows = torch.randn(case.num_sequences, case.capacity, DIM, device="cuda", dtype=torch.float16)
    queries = torch.randn(case.num_sequences, case.num_queries, DIM, device="cuda", dtype=torch.float16)
    floor = device.floor_s(case)
    report.add(str(case), "floor", floor * 1e6, "us")
    kernels = our_kernels(rows, queries)
    on_device = device_seconds_of(kernels)
    report.add(str(case), ON_DEVICE, on_device * 1e6, "us", goal=case.goal_us)
    report.add(str(case), f"{ON_DEVICE} / floor", on_device / floor, "ratio", goal=case.goal)
    if case in GOALS and (clock := clock_mhz(kernels, on_device)):
        report.add(str(case), "clock of the multiprocessors", clock, "MHz", better="higher")
    functions = ours(rows, queries) | (rivals(rows, queries) if has_rivals else {})
    seconds = seconds_of(functions)
    for name, value in seconds.items():
        report.add(str(case), name, value * 1e6, "us")
    best = min((value for name, value in seconds.items() if name not in (OURS, STANDING, NAME)), default=None)
    for name in (OURS, STANDING):
        if name in seconds:
            report.add(str(case), f"{name} / floor", seconds[name] / floor, "ratio")
            if best is not None:
                report.add(str(case), f"{name} / best rival", seconds[name] / best, "ratio", goal=1.0)


def measure_again(device: Ceilings, report: Report) -> None:
    """Adds the goals' cases of one query once more, on other memory and at another time: do they depend on that?"""
    for case in (case for case in GOALS if case.num_queries == 1):
        rows = torch.randn(case.num_sequences, case.capacity, DIM, device="cuda", dtype=torch.float16)
        queries = torch.randn(case.num_sequences, 1, DIM, device="cuda", dtype=torch.float16)
        again = device_seconds_of(our_kernels(rows, queries)) / device.floor_s(case)
        report.add(str(case), f"{ON_DEVICE} / floor, at the end", again, "ratio")


def ours(rows: torch.Tensor, queries: torch.Tensor) -> dict[str, Callable[[], object]]:
    """A whole retrieval by the engine, as the device thread does it, and as a decode loop does where it may."""
    names = [f"s{number}" for number in range(len(rows))]
    spec = MemorySpec(name="m", dim=DIM, capacity=rows.shape[1], max_sequences=len(rows))
    memory = Memory(spec, torch.device("cuda"), new_epoch=itertools.count(1).__next__)
    for name, keys in zip(names, rows, strict=True):
        part = SequencePart(sequence=name, num_rows=len(keys))
        memory.step([StepBatch(parts=(part,), layers=(0,), keys=keys[None], append=True)])
    parts = tuple(SequencePart(sequence=name, num_rows=queries.shape[1]) for name in names)
    batch = StepBatch(parts=parts, layers=(0,), keys=queries.flatten(0, 1)[None], retrieve=OPTIONS)
    found: dict[str, Callable[[], object]] = {OURS: lambda: memory.step([batch])}
    repeated = memory.repeat(batch)
    return found if repeated is None else found | {STANDING: standing_run(repeated, batch.keys)}


def standing_run(repeated: Repeated, queries: torch.Tensor) -> Callable[[], object]:
    """One run of a decode loop, but for the model."""
    standing = Standing(Guests(), repeated, None)
    graph = captured(standing.launch)

    def run() -> None:
        if not standing.enter(1.0):
            raise RuntimeError("what stands cannot be run")
        standing.queries.copy_(queries)
        graph.replay()
        standing.leave()

    return run


def our_kernels(
    rows: torch.Tensor, queries: torch.Tensor, first_pass: FirstPass = FirstPass.ROWS
) -> Callable[[], object]:
    """What the device does in that: the tables' copy, search, windows, distinct rows, gather."""
    num_sequences, capacity, _ = rows.shape
    spec = MemorySpec(name="m", dim=DIM, capacity=capacity, max_sequences=num_sequences, first_pass=first_pass)
    slab = Slab(spec, torch.device("cuda"))
    slab.write(slab.stage(rows.flatten(0, 1)[None], {}), torch.arange(num_sequences * capacity, device="cuda"))
    batch = SearchBatch(
        queries=queries.flatten(0, 1)[None],
        layers=(0,),
        places=tuple(range(num_sequences)),
        counts=(queries.shape[1],) * num_sequences,
        begins=(0,) * num_sequences,
        ends=(capacity,) * num_sequences,
        top_k=OPTIONS.top_k,
    )
    shape = scan_shape(DIM, rows.dtype, queries.dtype, queries.shape[1])
    sizes, numbers = tables(slab, batch, np.arange(num_sequences)[None], shape.queries)
    on_host = torch.from_numpy(numbers).pin_memory()
    on_device = on_host.cuda()
    asked = launch.Asked(
        queries=batch.queries[0],
        tables=sizes.split(on_device),
        sizes=sizes,
        shape=shape,
        top_k=OPTIONS.top_k,
        num_supers=launch.num_supers_of(slab, batch.ends),
        window=OPTIONS.window,
        is_coded=reads_codes(slab, OPTIONS.top_k, queries.shape[1]),
    )
    found, located = launch.found_for(asked), launch.located_for(asked)
    launch.search(slab, asked, found)
    launch.locate(slab, asked, found, located)
    rows_found = torch.empty((int(located.row_splits[-1]), DIM), dtype=rows.dtype, device="cuda")
    shared = few.shared_for(asked) if few.is_few(asked) else None

    def run() -> None:
        on_device.copy_(on_host, non_blocking=True)
        if shared is not None:
            few.retrieve(slab, asked, shared, found.scores, located, {KEY: rows_found})
            return
        launch.search(slab, asked, found, is_clearing=True)
        launch.locate(slab, asked, found, located)
        launch.gather(slab, KEY, located, rows_found)

    return run


def rivals(rows: torch.Tensor, queries: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Those that are installed."""
    found: dict[str, Callable[[], object]] = {"torch bmm and topk": torch_search(rows, queries)}
    others = {"faiss.knn_gpu in a loop": faiss_search, "neurocache": neurocache_search, NAME: memory_search}
    for name, make in others.items():
        try:
            found[name] = make(rows, queries)
        except ImportError as error:
            print(f"{name}: {error}")
    return found


def torch_search(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], object]:
    """Scores of all sequences at once, in fp16 products with float32 results, a few sequences at a time if many."""
    norms = rows.float().square().sum(-1)[:, None]
    step = max(1, (1 << 28) // (rows.shape[1] * queries.shape[1]))

    def search() -> list[torch.return_types.topk]:
        parts = zip(queries.split(step), rows.split(step), norms.split(step), strict=True)
        products = ((torch.bmm(some, keys.mT, out_dtype=torch.float32), lengths) for some, keys, lengths in parts)
        return [scores.mul_(2).sub_(lengths).topk(OPTIONS.top_k) for scores, lengths in products]

    return search


def faiss_search(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], object]:
    """One call a sequence over the same fp16 rows."""
    import faiss
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()
    pairs = list(zip(queries, rows, strict=True))
    return lambda: [faiss.knn_gpu(resources, some, keys, OPTIONS.top_k) for some, keys in pairs]


def neurocache_search(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], object]:
    """The package's own retrieval over the same rows."""
    from neurocache.cache import OnDeviceCache

    if queries.shape[1] > 1 or rows.shape[0] * rows.shape[1] > MOST_ROWS_OF_NEUROCACHE:
        raise ImportError("left out, as it takes it seconds")
    cache = OnDeviceCache(len(rows), rows.shape[1], key_features=DIM)
    cache.key_db = rows
    asked = queries.transpose(0, 1)
    return lambda: cache.topk_retrieval(asked, None, OPTIONS.top_k)


def memory_search(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], object]:
    """The kNN memory of memorizing-transformers-pytorch, which finds inner products."""
    return knn_memory_search(rows, queries, OPTIONS.top_k)


def draw(report: Report) -> Path:
    """How time grows with capacity, sequences and queries, as benchmarks/results/gpu-search.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    curves = (
        ("rows of a sequence (32 sequences, 1 query)", sorted({*BY_CAPACITY, *GOALS[:2]}, key=lambda c: c.capacity)),
        ("sequences (65,536 rows, 1 query)", sorted(BY_SEQUENCES, key=lambda case: case.num_sequences)),
        ("queries (8 sequences of 65,536 rows)", sorted(BY_QUERIES, key=lambda case: case.num_queries)),
    )
    for ax, (title, cases) in zip(axes, curves, strict=True):
        x = [(c.capacity, c.num_sequences, c.num_queries)[curves.index((title, cases))] for c in cases]
        for figure_name in ("floor", ON_DEVICE, OURS, "torch bmm and topk", "faiss.knn_gpu in a loop"):
            by_case = {row.case: row.value for row in report.rows if row.figure == figure_name}
            points = [(at, by_case[str(case)]) for at, case in zip(x, cases, strict=True) if str(case) in by_case]
            if points:
                style = "k--" if figure_name == "floor" else "o-"
                ax.plot(*zip(*points, strict=True), style, label=figure_name)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel(title)
    axes[0].set_ylabel("microseconds")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    path = RESULTS / "gpu-search.png"
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    """Measures all cases; without a CUDA device it says so and leaves the last result alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--goals-only", action="store_true", help="only the cases that have a goal, without rivals")
    options, _ = parser.parse_known_args()
    if not torch.cuda.is_available():
        print("no CUDA device: benchmarks/results/gpu-search.json stays as it is")
        return
    report, device = Report("gpu-search"), ceilings()
    report.add("device", "copy bandwidth", device.bytes_per_s / 1e12, "TB/s", better="higher")
    report.add("device", "fp16 product", device.flops / 1e12, "TFLOP/s", better="higher")
    cases = GOALS if options.goals_only else dict.fromkeys((*GOALS, *BY_CAPACITY, *BY_SEQUENCES, *BY_QUERIES))
    for case in cases:
        measure(case, device, report, has_rivals=not options.goals_only)
        torch.cuda.empty_cache()
    measure_again(device, report)
    if not options.goals_only:
        print(draw(report))
    print(report.write())


if __name__ == "__main__":
    main()
