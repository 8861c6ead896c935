"""Parts on a GPU: FAISS's inverted lists, with rows as they are stored or in product codes, and CAGRA.

An index belongs to one thread at a time: to the build thread until it is handed over, to the device's thread from then
on. So does what FAISS calls its resources (streams, cuBLAS, working memory), which each generation has for itself. What
FAISS does in one piece, and what copies much between host and device, holds up whoever else wants the device; hence
centres and codes are learnt in torch, rows are added a few at a time, and no row crosses to the host. CAGRA is built in
one piece all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memstore.errors import InvalidRequest
from memstore.index.clustering import centres, nearest_centres
from memstore.index.settings import CODED_ROWS, DEVICE_CODES, SAMPLES_A_LIST, settings_of
from memstore.types import IndexKind, Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memstore.index.generation import RowSource
    from memstore.types import IndexSettings, MemorySpec

CLUSTERING_ROUNDS = 10
"""After so many rounds of k-means the lists hardly change."""

WORKING_BYTES = 64 << 20
"""What FAISS may take for a search or an addition without asking the device for memory, which would wait for it."""

MOST_CANDIDATES = 2_048
"""More than so many FAISS does not find on a GPU."""

LONGEST_WALK = 512
"""Nor more than so many in a graph."""

_FIRST_ROWS = 1_024


class DevicePart:
    """See Part."""

    def __init__(self, index: Any, sign: float) -> None:
        """sign: what makes the index's distances scores."""
        self._index = index
        self._sign = sign

    def search(self, queries: torch.Tensor, seen: tuple[int, int], scores: torch.Tensor, ids: torch.Tensor) -> None:
        """On the current stream."""
        del seen
        with torch_utils().using_stream(self._index.getResources()):
            self._search(queries, scores, ids)
        scores.mul_(self._sign)

    def _search(self, queries: torch.Tensor, distances: torch.Tensor, ids: torch.Tensor) -> None:
        self._index.search(queries, distances.shape[1], D=distances, I=ids)


class GraphPart(DevicePart):
    """CAGRA, which reads the rows where they lay when it was built: they are kept here."""

    def __init__(self, faiss: Any, graph: Any, sign: float, rows: torch.Tensor, itopk: int) -> None:
        super().__init__(graph, sign)
        self._faiss = faiss
        self._rows = rows
        self._itopk = itopk

    def _search(self, queries: torch.Tensor, distances: torch.Tensor, ids: torch.Tensor) -> None:
        faiss, pointers, num = self._faiss, torch_utils(), distances.shape[1]
        told = faiss.SearchParametersCagra()
        told.itopk_size = max(self._itopk, -(-num // 32) * 32)
        asked, kind = queries, faiss.Float32
        pointer = pointers.swig_ptr_from_FloatTensor
        if self._rows.dtype == torch.float16:
            asked, kind, pointer = queries.half(), faiss.Float16, pointers.swig_ptr_from_HalfTensor
        out = pointers.swig_ptr_from_FloatTensor(distances), pointers.swig_ptr_from_IndicesTensor(ids)
        self._index.search_ex(len(asked), pointer(asked), kind, num, *out, told)
        _keep_once(ids)


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
        _check(self._settings)
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
        """Product codes are coarse, and rows of length 1 are rounded anew; other rows are kept as they are."""
        if self._spec.index is IndexKind.FAISS_IVF_PQ:
            return min(8 * top_k, MOST_CANDIDATES)
        wanted = 2 * top_k if self._spec.metric is Metric.COSINE else top_k
        return min(wanted, LONGEST_WALK if self._spec.index is IndexKind.FAISS_CAGRA else MOST_CANDIDATES)

    def build(self, rows: RowSource, check: Callable[[], None]) -> DevicePart:
        """On a stream of its own."""
        if self._stream is None:  # of the lowest priority there is; the same one always, as torch keeps memory for each
            self._stream = torch.cuda.Stream(self._device, priority=0)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), torch.no_grad():
            check()
            part = self._graph(rows) if self._spec.index is IndexKind.FAISS_CAGRA else self._lists(rows, check)
            torch.cuda.current_stream().synchronize()
            return part

    def _resources(self) -> Any:
        resources = self._faiss.StandardGpuResources()
        resources.setTempMemory(WORKING_BYTES)
        resources.setPinnedMemory(0)
        return resources

    def _graph(self, rows: RowSource) -> DevicePart:
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

    def _lists(self, rows: RowSource, check: Callable[[], None]) -> DevicePart:
        nlist = min(self._settings.nlist, len(rows) // 2)
        sample = rows.sample(max(nlist * SAMPLES_A_LIST, CODED_ROWS))
        found = centres(sample[None], nlist, CLUSTERING_ROUNDS, self._is_l2, check)
        index = self._on_device(self._empty_lists(found, sample, check))
        index.nprobe = min(self._settings.nprobe, nlist)
        index.reserveMemory(len(rows))
        for chunk in rows.chunks():
            check()
            index.add(chunk)
            torch.cuda.current_stream().synchronize()
        return DevicePart(index, self._sign)

    def _empty_lists(self, found: torch.Tensor, sample: torch.Tensor, check: Callable[[], None]) -> Any:
        """An index of the host with the centres of its lists, and nothing in them."""
        faiss, dim, nlist = self._faiss, self._spec.dim, found.shape[1]
        quantizer = faiss.IndexFlat(dim, self._metric)
        quantizer.add(found[0].cpu().numpy())
        if self._spec.index is IndexKind.FAISS_IVF_PQ:
            settings = self._settings
            index = faiss.IndexIVFPQ(quantizer, dim, nlist, settings.pq_m, settings.pq_bits, self._metric)
            faiss.copy_array_to_vector(self._codes(found, sample, check), index.pq.centroids)
        elif self._spec.dtype == torch.float16:
            kind = faiss.ScalarQuantizer.QT_fp16
            index = faiss.IndexIVFScalarQuantizer(quantizer, dim, nlist, kind, self._metric, False)
        else:
            index = faiss.IndexIVFFlat(quantizer, dim, nlist, self._metric)
        index.is_trained = True
        return index

    def _codes(self, found: torch.Tensor, sample: torch.Tensor, check: Callable[[], None]) -> Any:
        """The values of product codes, learnt from what is left of rows without the centres of their lists."""
        settings = self._settings
        points = sample[:: max(len(sample) // CODED_ROWS, 1)][:CODED_ROWS].clone()
        for some in torch.split(points, 4096):
            check()
            some.sub_(found[0][nearest_centres(some[None], found, self._is_l2)[0]])
        groups = points.view(len(points), settings.pq_m, -1).transpose(0, 1).contiguous()
        values = centres(groups, 1 << settings.pq_bits, CLUSTERING_ROUNDS, True, check)
        return values.flatten().cpu().numpy()

    def _on_device(self, index: Any) -> Any:
        options = self._faiss.GpuClonerOptions()
        options.useFloat16 = True  # for the tables of product codes, which have no room otherwise
        options.usePrecomputed = False
        return self._faiss.index_cpu_to_gpu(self._resources(), self._device.index or 0, index, options)


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


def _check(settings: IndexSettings) -> None:
    """What FAISS can do on a GPU."""
    if settings.pq_m and settings.pq_m not in DEVICE_CODES:
        raise InvalidRequest("spec.index_settings.pq_m", f"{settings.pq_m}: on a GPU one of {DEVICE_CODES}")
    if settings.pq_bits not in (0, 8):
        raise InvalidRequest("spec.index_settings.pq_bits", f"{settings.pq_bits}: on a GPU only 8")
