"""Plain FAISS: one index over all rows, of the type that generations have, trained and searched as ours are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import faiss
import torch

from memstore.index.host_clustering import CLUSTERING_ROUNDS
from memstore.index.settings import CHUNK_ROWS, CODED_ROWS, SAMPLES_A_LIST
from memstore.types import IndexKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.types import IndexSettings

TOP_K = 16
FP16: Any = faiss.ScalarQuantizer.QT_fp16


def plain_index(kind: IndexKind, rows: torch.Tensor, settings: IndexSettings) -> Callable[[torch.Tensor], torch.Tensor]:
    """Builds with all of the device; gives a search, (n, dim) float16 -> (n, 16) positions on the host."""
    if rows.is_cuda:
        return _on_gpu(kind, rows, settings)
    index = _host_graph(rows, settings) if kind is IndexKind.FAISS_CAGRA else _host_lists(kind, rows, settings)

    def search(queries: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(index.search(queries.float().numpy(), TOP_K)[1])

    return search


def _on_gpu(kind: IndexKind, rows: torch.Tensor, settings: IndexSettings) -> Callable[[torch.Tensor], torch.Tensor]:
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()
    if kind is IndexKind.FAISS_CAGRA:
        config = faiss.GpuIndexCagraConfig()
        config.graph_degree, config.intermediate_graph_degree = settings.graph_degree, 2 * settings.graph_degree
        config.build_algo = faiss.graph_build_algo_NN_DESCENT
        graph: Any = faiss.GpuIndexCagra(resources, rows.shape[1], faiss.METRIC_L2, config)
        graph.train(rows, numeric_type=faiss.Float16)
        return lambda queries: _walk(graph, queries).cpu()
    index: Any
    shape = (resources, rows.shape[1], settings.nlist)
    if kind is IndexKind.FAISS_IVF_PQ:
        config = faiss.GpuIndexIVFPQConfig()
        config.useFloat16LookupTables = True
        index = faiss.GpuIndexIVFPQ(*shape, settings.pq_m, settings.pq_bits, faiss.METRIC_L2, config)
    else:
        index = faiss.GpuIndexIVFScalarQuantizer(*shape, FP16, faiss.METRIC_L2, False)
    index.cp.niter, index.cp.max_points_per_centroid = CLUSTERING_ROUNDS, SAMPLES_A_LIST
    index.train(_sample(rows, settings).float())
    index.nprobe = settings.nprobe
    index.reserveMemory(len(rows))
    for some in torch.split(rows, CHUNK_ROWS):
        index.add(some.float())
    return lambda queries: index.search(queries.float(), TOP_K)[1].cpu()


def _walk(graph: Any, queries: torch.Tensor) -> torch.Tensor:
    """The wrapper of FAISS for tensors takes float32 queries only."""
    from faiss.contrib import torch_utils

    distances = torch.empty((len(queries), TOP_K), device=queries.device)
    ids = torch.empty((len(queries), TOP_K), dtype=torch.int64, device=queries.device)
    out = torch_utils.swig_ptr_from_FloatTensor(distances), torch_utils.swig_ptr_from_IndicesTensor(ids)
    with torch_utils.using_stream(graph.getResources()):
        graph.search_ex(len(queries), torch_utils.swig_ptr_from_HalfTensor(queries), faiss.Float16, TOP_K, *out)
    return ids


def _host_graph(rows: torch.Tensor, settings: IndexSettings) -> Any:
    graph = faiss.IndexHNSWSQ(rows.shape[1], FP16, settings.graph_degree // 2)
    graph.train(rows[:1].float().numpy())
    graph.hnsw.efSearch = settings.itopk
    _add(graph, rows)
    return graph


def _host_lists(kind: IndexKind, rows: torch.Tensor, settings: IndexSettings) -> Any:
    dim, nlist = rows.shape[1], settings.nlist
    centres = faiss.IndexFlatL2(dim)
    index: Any
    if kind is IndexKind.FAISS_IVF_PQ:
        index = faiss.IndexIVFPQ(centres, dim, nlist, settings.pq_m, settings.pq_bits)
        index.by_residual = False
        index.pq.cp.min_points_per_centroid, index.pq.cp.niter = 1, CLUSTERING_ROUNDS
        index.pq.cp.max_points_per_centroid = CODED_ROWS >> settings.pq_bits
    else:
        index = faiss.IndexIVFScalarQuantizer(centres, dim, nlist, FP16, faiss.METRIC_L2, False)
    index.cp.niter, index.cp.max_points_per_centroid = CLUSTERING_ROUNDS, SAMPLES_A_LIST
    index.train(_sample(rows, settings).float().numpy())
    index.nprobe = settings.nprobe
    _add(index, rows)
    return index


def _sample(rows: torch.Tensor, settings: IndexSettings) -> torch.Tensor:
    """As many rows as our lists are trained with, evenly spread."""
    step = max(len(rows) // max(settings.nlist * SAMPLES_A_LIST, CODED_ROWS), 1)
    return rows[::step]


def _add(index: Any, rows: torch.Tensor) -> None:
    for some in torch.split(rows, CHUNK_ROWS):
        index.add(some.float().numpy())
