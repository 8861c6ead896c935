"""Parts on the host: FAISS's inverted lists, with rows as they are stored or in product codes, and its HNSW graph."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memstore.errors import InvalidRequest
from memstore.index.courtesy import Paced
from memstore.index.host_clustering import Centres, clustered, flat, slices
from memstore.index.settings import CODED_ROWS, SAMPLES_A_LIST, settings_of
from memstore.types import IndexKind, Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from memstore.index.generation import RowSource
    from memstore.types import MemorySpec

GRAPH_ROWS = 8
"""Rows that a graph takes in at a time: a millisecond of one thread."""

ADDED_ROWS = 64
"""Rows that lists take in at a time: it takes a millisecond to make product codes of them."""

CORES_A_BUILD = 8
"""One core in so many is a build's."""


class HostPart:
    """See Part. Threads may search it at the same time."""

    def __init__(self, index: Any, sign: float, params: Callable[..., Any]) -> None:
        """sign: what makes the index's distances scores. params: makes what a search is told, of num and selector."""
        self._index = index
        self._sign = sign
        self._params = params

    def search(self, queries: torch.Tensor, seen: tuple[int, int], scores: torch.Tensor, ids: torch.Tensor) -> None:
        """In this thread alone. What FAISS finds is copied, as two threads may search for the same."""
        import faiss

        num = scores.shape[1]
        is_whole = seen[1] - seen[0] == self._index.ntotal
        selector = None if is_whole else faiss.IDSelectorRange(*seen)
        with _threads(faiss, 1):
            distances, found = self._index.search(queries.numpy(), num, params=self._params(num, selector))
        np.multiply(distances, self._sign, out=scores.numpy())
        ids.numpy()[:] = found


class HostBuilder:
    """See PartBuilder. Raises InvalidRequest at creation where FAISS is not installed."""

    can_mask = True

    def __init__(self, spec: MemorySpec, device: torch.device) -> None:
        del device
        try:
            import faiss
        except ImportError as error:
            raise InvalidRequest(
                "spec.index", f"{spec.index.value} needs faiss, which is not installed here"
            ) from error
        self._faiss: Any = faiss
        self._spec = spec
        self._settings = settings_of(spec)
        is_l2 = spec.metric is Metric.L2
        self._metric: int = faiss.METRIC_L2 if is_l2 else faiss.METRIC_INNER_PRODUCT
        self._sign = -1.0 if is_l2 else 1.0
        kinds = {torch.float16: faiss.ScalarQuantizer.QT_fp16, torch.bfloat16: faiss.ScalarQuantizer.QT_bf16}
        self._stored: int | None = kinds.get(spec.dtype)

    def candidates(self, top_k: int) -> int:
        """Product codes are coarse, and rows of length 1 are rounded anew; other rows are kept as they are."""
        if self._spec.index is IndexKind.FAISS_IVF_PQ:
            return 8 * top_k
        return 2 * top_k if self._spec.metric is Metric.COSINE else top_k

    def build(self, rows: RowSource, check: Callable[[], None]) -> HostPart:
        """With one core in eight."""
        check = Paced(check)
        with _threads(self._faiss, max((os.cpu_count() or 1) // CORES_A_BUILD, 1)):
            if self._spec.index is IndexKind.FAISS_CAGRA:
                return self._graph(rows, check)
            return self._lists(rows, check)

    def _graph(self, rows: RowSource, check: Callable[[], None]) -> HostPart:
        faiss, settings = self._faiss, self._settings
        shape = (self._spec.dim, settings.graph_degree // 2, self._metric)
        if self._stored is None:
            graph = faiss.IndexHNSWFlat(*shape)
        else:
            graph = faiss.IndexHNSWSQ(shape[0], self._stored, *shape[1:])
            graph.train(rows.sample(1).numpy())  # nothing is learnt
        for chunk in rows.chunks():
            for piece in torch.split(chunk, GRAPH_ROWS):
                check()
                graph.add(piece.numpy())

        def params(num: int, selector: Any) -> Any:
            return faiss.SearchParametersHNSW(efSearch=max(settings.itopk, num), sel=selector)

        return HostPart(graph, self._sign, params)

    def _lists(self, rows: RowSource, check: Callable[[], None]) -> HostPart:
        faiss, settings = self._faiss, self._settings
        learnt = self._centres(rows, check)
        index = self._empty_lists(flat(self._faiss, learnt, self._metric))
        if self._spec.index is IndexKind.FAISS_IVF_PQ:
            faiss.copy_array_to_vector(self._codes(rows, check).ravel(), index.pq.centroids)
        index.is_trained = True
        lists = np.empty(len(rows), np.int64)
        centres = Centres(faiss, learnt, self._metric)
        first = 0
        for chunk in rows.chunks():
            for some in slices(chunk.numpy()):
                lists[first : first + len(some)] = centres.nearest(some, check)
                first += len(some)
        _reserve(faiss, index, lists, check)
        first = 0
        for chunk in rows.chunks():
            for piece in torch.split(chunk, ADDED_ROWS):
                check()
                end = first + len(piece)
                arrays = (piece.numpy(), np.arange(first, end), lists[first:end])
                index.add_core(len(piece), *map(faiss.swig_ptr, arrays))
                first = end

        def params(num: int, selector: Any) -> Any:
            del num
            return faiss.SearchParametersIVF(nprobe=settings.nprobe, sel=selector)

        return HostPart(index, self._sign, params)

    def _centres(self, rows: RowSource, check: Callable[[], None]) -> NDArray[np.float32]:
        """(num, dim) centres of the lists, learnt from a sample."""
        nlist = min(self._settings.nlist, len(rows))
        sample = rows.sample(self._settings.nlist * SAMPLES_A_LIST).numpy()
        return clustered(self._faiss, sample, nlist, self._metric, check)

    def _codes(self, rows: RowSource, check: Callable[[], None]) -> NDArray[np.float32]:
        """(pq_m, 2^pq_bits, width): the values of product codes, learnt from a sample."""
        settings = self._settings
        sample = rows.sample(CODED_ROWS).numpy()
        groups = sample.reshape(len(sample), settings.pq_m, -1).swapaxes(0, 1)
        num = 1 << settings.pq_bits
        return np.stack([clustered(self._faiss, group.copy(), num, self._faiss.METRIC_L2, check) for group in groups])

    def _empty_lists(self, centres: Any) -> Any:
        faiss, settings = self._faiss, self._settings
        shape = (centres, self._spec.dim, centres.ntotal)
        if self._spec.index is IndexKind.FAISS_IVF_PQ:
            index = faiss.IndexIVFPQ(*shape, settings.pq_m, settings.pq_bits, self._metric)
            index.by_residual = False  # so that one table of distances serves all lists
        elif self._stored is None:
            index = faiss.IndexIVFFlat(*shape, self._metric)
        else:
            index = faiss.IndexIVFScalarQuantizer(*shape, self._stored, self._metric, False)
        return index


def _reserve(faiss: Any, index: Any, assigned: NDArray[np.int64], check: Callable[[], None]) -> None:
    """Makes every list as long as it will be, and empty: lists that grow take up to twice the room."""
    lists = faiss.downcast_InvertedLists(index.invlists)
    for number, length in enumerate(np.bincount(assigned, minlength=index.nlist).tolist()):
        check()  # memory is touched
        lists.resize(number, length)
        lists.resize(number, 0)


@contextmanager
def _threads(faiss: Any, number: int) -> Iterator[None]:
    """Has FAISS use so many threads for what this thread asks of it."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
