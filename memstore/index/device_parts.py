"""Parts on a GPU: FAISS's CAGRA. (Inverted lists are our own there, see list_parts.py.)

An index belongs to one thread at a time: to the build thread until it is handed over, to the device's thread from then
on. So does what FAISS calls its resources (streams, cuBLAS, working memory), which each generation has for itself. A
graph is built in one piece, which asks the device for memory and gives it back all the time: whoever else starts a
kernel then waits, tens of milliseconds at worst. No row crosses to the host.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from memstore.errors import InvalidRequest
from memstore.index.settings import settings_of
from memstore.types import Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memstore.index.generation import RowSource
    from memstore.types import MemorySpec

CORES_A_BUILD = 8
"""One core in so many is a build's."""

WORKING_BYTES = 64 << 20
"""What FAISS may take for a search without asking the device for memory, which would wait for it."""

LONGEST_WALK = 512
"""More rows than so many FAISS does not find in a graph."""

_FIRST_ROWS = 1_024


class GraphPart:
    """See Part. It reads the rows where they lay when the graph was built: they are kept here."""

    def __init__(self, faiss: Any, graph: Any, sign: float, rows: torch.Tensor, itopk: int) -> None:
        """sign: what makes the graph's distances scores."""
        self._faiss = faiss
        self._graph = graph
        self._sign = sign
        self._rows = rows
        self._itopk = itopk

    def search(self, queries: torch.Tensor, seen: tuple[int, int], scores: torch.Tensor, ids: torch.Tensor) -> None:
        """On the current stream."""
        del seen
        faiss, pointers, num = self._faiss, torch_utils(), scores.shape[1]
        told = faiss.SearchParametersCagra()
        told.itopk_size = max(self._itopk, -(-num // 32) * 32)
        asked, kind = queries, faiss.Float32
        pointer = pointers.swig_ptr_from_FloatTensor
        if self._rows.dtype == torch.float16:
            asked, kind, pointer = queries.half(), faiss.Float16, pointers.swig_ptr_from_HalfTensor
        out = pointers.swig_ptr_from_FloatTensor(scores), pointers.swig_ptr_from_IndicesTensor(ids)
        with pointers.using_stream(self._graph.getResources()):
            self._graph.search_ex(len(asked), pointer(asked), kind, num, *out, told)
        _keep_once(ids)
        scores.mul_(self._sign)


def _keep_once(ids: torch.Tensor) -> None:
    """Puts -1 in place of what was found before, as a walk may meet a row again."""
    ordered, order = ids.sort(-1)
    is_repeated = torch.zeros_like(ids, dtype=torch.bool)
    is_repeated.scatter_(-1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
    ids.masked_fill_(is_repeated, -1)


def torch_utils() -> Any:
    """What FAISS has for tensors; to import it changes FAISS's own functions, for good."""
    from faiss.contrib import torch_utils

    return torch_utils


class DeviceBuilder:
    """See PartBuilder. Raises InvalidRequest at creation where FAISS is not installed, or not for GPUs."""

    can_mask = False

    def __init__(self, spec: MemorySpec, device: torch.device) -> None:
        try:
            import faiss
        except ImportError as error:
            raise InvalidRequest("spec.index", f"{spec.index.value} needs faiss, which is not here") from error
        if not hasattr(faiss, "StandardGpuResources"):
            raise InvalidRequest("spec.index", f"{spec.index.value} needs FAISS for GPUs, which is not here")
        torch_utils()
        self._faiss: Any = faiss
        self._spec = spec
        self._settings = settings_of(spec)
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._is_l2 = spec.metric is Metric.L2
        self._metric: int = faiss.METRIC_L2 if self._is_l2 else faiss.METRIC_INNER_PRODUCT
        self._sign = -1.0 if self._is_l2 else 1.0

    def prepare(self) -> None:
        """Builds and asks a part of random rows, so that every kernel is loaded."""
        rows = _Random(self._device, self._spec.dim)
        torch.cuda.current_stream(self._device).synchronize()  # they are read on another one
        part = self.build(rows, lambda: None)
        scores = torch.empty((1, 1), device=self._device)
        part.search(rows.sample(1), (0, len(rows)), scores, torch.empty_like(scores, dtype=torch.int64))

    def candidates(self, top_k: int) -> int:
        """Rows of length 1 are rounded anew; other rows are kept as they are."""
        return min(2 * top_k if self._spec.metric is Metric.COSINE else top_k, LONGEST_WALK)

    def build(self, rows: RowSource, check: Callable[[], None]) -> GraphPart:
        """On a stream of its own."""
        if self._stream is None:  # of the lowest priority there is; the same one always, as torch keeps memory for each
            self._stream = torch.cuda.Stream(self._device, priority=0)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), torch.no_grad():
            check()
            self._faiss.omp_set_num_threads(max((os.cpu_count() or 1) // CORES_A_BUILD, 1))  # of this thread's work
            graph = self._graph(rows)
            torch.cuda.current_stream().synchronize()
            return graph

    def _resources(self) -> Any:
        resources = self._faiss.StandardGpuResources()
        resources.setTempMemory(WORKING_BYTES)
        resources.setPinnedMemory(0)
        return resources

    def _graph(self, rows: RowSource) -> GraphPart:
        faiss, settings = self._faiss, self._settings
        width = torch.float16 if self._spec.dtype == torch.float16 else torch.float32
        config = faiss.GpuIndexCagraConfig()
        config.device = self._device.index or 0
        config.graph_degree = settings.graph_degree
        config.intermediate_graph_degree = 2 * settings.graph_degree
        config.build_algo = faiss.graph_build_algo_NN_DESCENT
        graph = faiss.GpuIndexCagra(self._resources(), self._spec.dim, self._metric, config)
        copied = torch.cat([chunk.to(width) for chunk in rows.chunks()])
        graph.train(copied, numeric_type=faiss.Float16 if width == torch.float16 else faiss.Float32)
        return GraphPart(faiss, graph, self._sign, copied, settings.itopk)


class _Random:
    """Rows for a first build, of which nothing is kept."""

    first = 0

    def __init__(self, device: torch.device, dim: int) -> None:
        self._rows = torch.randn(_FIRST_ROWS, dim, device=device)

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, num: int) -> torch.Tensor:
        """The first ones."""
        return self._rows[:num]

    def chunks(self) -> Iterator[torch.Tensor]:
        """All at once."""
        yield self._rows
