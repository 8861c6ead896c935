"""How far is the engine's exact retrieval on a GPU from reading the rows once, and from the ways around it?

All work of a retrieval is in it: search, scores, windows, distinct rows, their gather. Rivals only search: torch (bmm
and topk over all sequences), and `faiss.knn_gpu` once a sequence. The floor is the larger of the stored bytes over the
bandwidth of a large copy and the operations over the rate of a large fp16 product, both measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.report import Report
from memstore.memory import Memory
from memstore.types import MemorySpec, RetrieveOptions, SequencePart, StepBatch

if TYPE_CHECKING:
    from collections.abc import Callable

DIM = 256
TOP_K = 16
CASES = ((1, 131_072, 1), (32, 16_384, 1), (32, 65_536, 1), (8, 65_536, 512), (32, 16_384, 512))
ROUNDS = 9


@dataclass(frozen=True, slots=True)
class Ceilings:
    """bytes_per_s: of a device copy, bytes read and written. flops: operations a second of an fp16 product."""

    bytes_per_s: float
    flops: float


def seconds_of(functions: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each function with the device done, all called in turn once a round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 2):
        for name, function in functions.items():
            torch.cuda.synchronize()
            begun = time.perf_counter()
            function()
            torch.cuda.synchronize()
            if number >= 2:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ceilings() -> Ceilings:
    """Measures the device."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target, square = torch.empty_like(source), torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    found = seconds_of({"copy": lambda: target.copy_(source), "product": lambda: square @ square})
    return Ceilings(2 * source.numel() / found["copy"], 2 * 8192**3 / found["product"])


def measure(case: tuple[int, int, int], device: Ceilings, report: Report) -> None:
    """Adds the rows of one case: sequences, live rows of each, queries of each."""
    num_sequences, capacity, num_queries = case
    rows = torch.randn(num_sequences, capacity, DIM, device="cuda", dtype=torch.float16)
    queries = torch.randn(num_sequences, num_queries, DIM, device="cuda", dtype=torch.float16)
    functions: dict[str, Callable[[], object]] = {"memstore": our_retrieval(rows, queries)}
    functions["torch bmm and topk"] = torch_search(rows, queries)
    try:
        functions["faiss.knn_gpu in a loop"] = faiss_search(rows, queries)
    except ImportError:
        print("FAISS is not installed")
    seconds = seconds_of(functions)
    name = f"{num_sequences} x {capacity} x {DIM} float16, {num_queries} queries each"
    floor = max(rows.nbytes / device.bytes_per_s, 2 * num_sequences * capacity * num_queries * DIM / device.flops)
    report.add(name, "floor", floor * 1e6, "us")
    for label, value in seconds.items():
        report.add(name, label, value * 1e6, "us")
    report.add(name, "memstore / floor", seconds["memstore"] / floor, "ratio")
    report.add(name, "memstore / best rival", seconds.pop("memstore") / min(seconds.values()), "ratio")


def our_retrieval(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], object]:
    """A whole retrieval by the engine, as the device thread does it."""
    names = [f"s{number}" for number in range(len(rows))]
    spec = MemorySpec(name="m", dim=DIM, capacity=rows.shape[1], max_sequences=len(rows))
    memory = Memory(spec, torch.device("cuda"), new_epoch=itertools.count(1).__next__)
    for name, keys in zip(names, rows, strict=True):
        part = SequencePart(sequence=name, num_rows=len(keys))
        memory.step([StepBatch(parts=(part,), layers=(0,), keys=keys[None], append=True)])
    batch = StepBatch(
        parts=tuple(SequencePart(sequence=name, num_rows=queries.shape[1]) for name in names),
        layers=(0,),
        keys=queries.flatten(0, 1)[None],
        retrieve=RetrieveOptions(top_k=TOP_K, window_after=1),
    )
    return lambda: memory.step([batch])


def torch_search(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], object]:
    """Scores of all sequences at once, in fp16 products with float32 results, a few sequences at a time if many."""
    norms = rows.float().square().sum(-1)[:, None]
    step = max(1, (1 << 28) // (rows.shape[1] * queries.shape[1]))

    def search() -> list[torch.return_types.topk]:
        parts = zip(queries.split(step), rows.split(step), norms.split(step), strict=True)
        products = ((torch.bmm(some, keys.mT, out_dtype=torch.float32), lengths) for some, keys, lengths in parts)
        return [scores.mul_(2).sub_(lengths).topk(TOP_K) for scores, lengths in products]

    return search


def faiss_search(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], object]:
    """One call a sequence over the same fp16 rows."""
    import faiss
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()
    pairs = list(zip(queries, rows, strict=True))
    return lambda: [faiss.knn_gpu(resources, some, keys, TOP_K) for some, keys in pairs]


def main() -> None:
    """Measures all cases; without a CUDA device it says so and leaves the last result alone."""
    argparse.ArgumentParser(description=__doc__).parse_known_args()
    if not torch.cuda.is_available():
        print("no CUDA device: benchmarks/results/gpu.json stays as it is")
        return
    report, device = Report("gpu"), ceilings()
    report.add("device", "copy bandwidth", device.bytes_per_s / 1e12, "TB/s", better="higher")
    report.add("device", "fp16 product", device.flops / 1e12, "TFLOP/s", better="higher")
    for case in CASES:
        measure(case, device, report)
        torch.cuda.empty_cache()
    print(report.write())


if __name__ == "__main__":
    main()
