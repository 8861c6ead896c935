"""How fast is exact search on the host, against other ways to do it, and against reading the rows once?

Rivals get the same rows in float32 ready for them: `faiss.knn` once a sequence with its defaults, torch (bmm and topk
over all sequences for one query each, addmm and topk once a sequence for many), and the cache of the `neurocache`
package, whose results are approximate (not for many queries of many sequences, which takes it minutes). So are those of
the kNN memory of `memorizing-transformers-pytorch`, which is asked where it is installed and has few rows.

The read floor is what compiled code takes to read as many bytes as are stored, in memory that a slab of the same spec
has reserved, with one thread or with all of them, called and shared out as the search is: whichever is faster. All of
them come in turn, so each finds the caches full of what the others have read.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import faiss
import torch
from neurocache.cache import OnDeviceCache

from benchmarks.knn_memory import NAME, knn_memory_search
from benchmarks.reader import Reader
from benchmarks.report import Report, interleaved
from memstore.index.exact import ExactIndex
from memstore.memory import Memory
from memstore.search import SearchBatch
from memstore.slab import Slab
from memstore.types import MemorySpec, RetrieveOptions, SequencePart, StepBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

DIM = 256
TOP_K = 16
PREFILL_QUERIES = 512
OURS, WHOLE = "memstore", "memstore, with rows and windows"
READ_ALONE, READ = "reading the rows, one thread", "reading the rows, all threads"


@dataclass(frozen=True, slots=True)
class Case:
    """One size: sequences of `capacity` live rows with `num_queries` queries each."""

    num_sequences: int
    capacity: int
    num_queries: int
    dtype: torch.dtype

    def __str__(self) -> str:
        kind = "decode" if self.num_queries == 1 else f"prefill of {self.num_queries}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.num_sequences} x {self.capacity} x {DIM} {dtype}, {kind}"

    @property
    def spec(self) -> MemorySpec:
        """Of a memory of that size."""
        return MemorySpec(name="m", dim=DIM, capacity=self.capacity, max_sequences=self.num_sequences, dtype=self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the keys."""
        return self.num_sequences * self.capacity * DIM * self.dtype.itemsize


def measure(case: Case, report: Report, rounds: int) -> None:
    """Adds the rows of one case."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(case.num_sequences, case.capacity, DIM, generator=generator).to(case.dtype).float()
    queries = torch.randn(case.num_sequences, case.num_queries, DIM, generator=generator)
    functions: dict[str, Callable[[], object]] = {
        **reading(case),
        **our_search(case, rows, queries),
        "faiss.knn in a loop": faiss_search(rows, queries),
        "torch products and topk": torch_search(rows, queries),
    }
    if case.num_queries == 1 or case.num_sequences == 1:  # the rest takes it minutes
        functions["neurocache (approximate)"] = neurocache_search(case, rows, queries)
    try:
        functions[NAME] = knn_memory_search(rows, queries, TOP_K)
    except ImportError as error:
        print(f"{NAME}: {error}")
    seconds = interleaved(functions, rounds)
    floor = min(seconds.pop(READ), seconds.pop(READ_ALONE))
    ours, whole = seconds.pop(OURS), seconds.pop(WHOLE)
    report.add(str(case), "read floor", floor * 1e3, "ms")
    for name, value in {OURS: ours, WHOLE: whole, **seconds}.items():
        report.add(str(case), name, value * 1e3, "ms")
    report.add(
        str(case),
        "time / best rival",
        ours / min(value for name, value in seconds.items() if name != NAME),
        "ratio",
        goal=1.0,
    )
    report.add(str(case), "with rows and windows / search", whole / ours, "ratio")
    if case.num_queries == 1:
        report.add(str(case), "measured read bandwidth", case.stored_bytes / floor / 1e9, "GB/s", better="higher")
        report.add(str(case), "time / read floor", ours / floor, "ratio", goal=1.4)


def reading(case: Case) -> dict[str, Callable[[], object]]:
    """Reading a slab, once; each has one of its own, or the second would find in the caches what the first has read."""
    helpers = {READ_ALONE: 0, READ: torch.get_num_threads() - 1}
    return {name: Reader(_words(case), num_helpers).read for name, num_helpers in helpers.items()}


def _words(case: Case) -> NDArray[np.int64]:
    """The keys of a slab of a case's spec."""
    words: NDArray[np.int64] = Slab(case.spec, torch.device("cpu")).keys.view(-1).view(torch.int64).numpy()
    return words


def our_search(case: Case, rows: torch.Tensor, queries: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The search alone, as the rivals do it, and a whole retrieval: the search and each distinct row once."""
    names = [f"s{number}" for number in range(case.num_sequences)]
    memory = Memory(case.spec, torch.device("cpu"), new_epoch=itertools.count(1).__next__)
    for name, keys in zip(names, rows, strict=True):
        part = SequencePart(sequence=name, num_rows=case.capacity)
        memory.step([StepBatch(parts=(part,), layers=(0,), keys=keys[None], append=True)])
    asked = queries.flatten(0, 1)[None]
    parts = tuple(SequencePart(sequence=name, num_rows=case.num_queries) for name in names)
    step = StepBatch(parts=parts, layers=(0,), keys=asked, retrieve=RetrieveOptions(top_k=TOP_K, window_after=1))
    slab = Slab(case.spec, torch.device("cpu"))
    slab.write(slab.stage(rows.flatten(0, 1)[None], {}), torch.arange(rows.shape[0] * rows.shape[1]))
    search = SearchBatch(
        queries=asked,
        layers=(0,),
        places=tuple(range(case.num_sequences)),
        counts=(case.num_queries,) * case.num_sequences,
        begins=(0,) * case.num_sequences,
        ends=(case.capacity,) * case.num_sequences,
        top_k=TOP_K,
    )
    index = ExactIndex()
    return {OURS: lambda: index.search(slab, search), WHOLE: lambda: memory.step([step])}


def faiss_search(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], object]:
    """One call a sequence."""
    pairs = list(zip(queries.numpy(), rows.numpy(), strict=True))
    return lambda: [faiss.knn(some, all_rows, TOP_K) for some, all_rows in pairs]


def torch_search(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], object]:
    """One call for all where each has one query; otherwise one a sequence, as the scores would fill the memory."""
    norms = rows.square().sum(-1)
    if queries.shape[1] == 1:
        return lambda: torch.baddbmm(norms[:, None], queries, rows.mT, beta=-1, alpha=2).topk(TOP_K)
    triples = list(zip(norms, queries, rows, strict=True))
    return lambda: [
        torch.addmm(lengths, some, all_rows.T, beta=-1, alpha=2).topk(TOP_K) for lengths, some, all_rows in triples
    ]


def neurocache_search(case: Case, rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], object]:
    """The package's own retrieval over the same rows."""
    cache = OnDeviceCache(case.num_sequences, case.capacity, key_features=DIM)
    cache.key_db = rows
    asked = queries.transpose(0, 1)
    return lambda: cache.topk_retrieval(asked, None, TOP_K)


def main() -> None:
    """Measures all cases, or with --quick the small ones in few rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 and 8 sequences of 16,384 rows, three rounds")
    parser.add_argument("--max-rows", type=int, default=1 << 30, help="leave out cases with more live rows in all")
    options = parser.parse_args()
    is_quick = options.quick
    report = Report("search")
    sizes = itertools.product((1, 8), (16_384,)) if is_quick else itertools.product((1, 8, 32), (16_384, 65_536))
    for num_sequences, capacity in sizes:
        if num_sequences * capacity > options.max_rows:
            continue
        for num_queries, dtype in ((1, torch.float16), (1, torch.float32), (PREFILL_QUERIES, torch.float16)):
            rounds = 7 if is_quick and num_queries == 1 else 3 if is_quick else 15 if num_queries == 1 else 4
            measure(Case(num_sequences, capacity, num_queries, dtype), report, rounds)
    print(report.write())


if __name__ == "__main__":
    main()
