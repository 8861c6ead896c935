"""Exact search by the way that is fastest on the slab's device: compiled kernels, or matrix products in torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from memstore.gpu.tuning import MOST_HITS
from memstore.index.base import Stateless, no_candidates
from memstore.index.grid import grids
from memstore.index.product_scan import ProductScan
from memstore.index.ranking import rank
from memstore.index.repeating import HostSteady
from memstore.index.staged import staged_retrieve
from memstore.logs import event

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from memstore.index.base import Steady
    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import Hits, RetrieveOptions

_log = logging.getLogger(__name__)


class Retriever(Protocol):
    """Compiled kernels for one type of device; see VectorIndex."""

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See VectorIndex.search."""
        ...

    def retrieve(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]) -> Hits:
        """See VectorIndex.retrieve."""
        ...

    def close(self) -> None:
        """Lets go of the slab that was searched last, and of what helped with it."""
        ...


class GpuRetriever(Retriever, Protocol):
    """Those for a GPU."""

    def steady(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions) -> Steady | None:
        """See VectorIndex.steady."""
        ...


def prepare(device: torch.device) -> None:
    """Has what searches on a device need compiled, as far as that can be known, so that none waits for it."""
    try:
        if device.type == "cpu":
            from memstore.host.warming import warm

            warm()
        else:
            from memstore.gpu import warming

            warming.warm(device)
    except ImportError as error:
        event(_log, logging.WARNING, "kernels cannot be compiled: search is several times slower", reason=error)


class ExactIndex(Stateless):
    """See VectorIndex."""

    def __init__(self) -> None:
        self._products = ProductScan()
        self._host = _host_retriever()
        self._gpu: GpuRetriever | None = None

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Searches all sequences at once, or as many as the scratch has room for."""
        if compiled := self._compiled(slab, batch):
            return compiled.search(slab, batch)
        candidates = no_candidates(batch)
        for grid in grids(slab, batch):
            for at, layer in enumerate(batch.layers):
                found = self._products.search(slab, layer, grid, grid.spread(batch.queries[at]), batch.top_k)
                candidates[at, grid.columns, : found.shape[2]] = grid.collect(found)
        return rank(slab, batch, candidates)

    def retrieve(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]) -> Hits:
        """In one go where there are kernels for it, else stage by stage."""
        if compiled := self._compiled(slab, batch):
            return compiled.retrieve(slab, batch, options, groups)
        return staged_retrieve(self, slab, batch, options, groups)

    def steady(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions) -> Steady | None:
        """See VectorIndex."""
        if slab.is_on_host:
            return HostSteady(self, slab, batch, options)
        self._compiled(slab, batch)
        gpu = self._gpu if batch.top_k <= MOST_HITS else None
        return None if gpu is None else gpu.steady(slab, batch, options)

    def close(self) -> None:
        """Lets go of the slab and of the threads that helped with it."""
        for retriever in (self._host, self._gpu):
            if retriever is not None:
                retriever.close()

    def _compiled(self, slab: Slab, batch: SearchBatch) -> Retriever | None:
        """The kernels for a batch; None where their compiler is missing, and for more hits than they have room for."""
        if slab.is_on_host:
            return self._host
        if batch.top_k > MOST_HITS:
            return None
        self._gpu = self._gpu or _gpu_retriever()
        return self._gpu


def _host_retriever() -> Retriever | None:
    """None where numba cannot be used."""
    try:
        from memstore.host.retriever import HostRetriever
    except ImportError:
        return None
    return HostRetriever()


def _gpu_retriever() -> GpuRetriever | None:
    """None where Triton cannot be used."""
    try:
        from memstore.gpu import retriever
    except ImportError:
        return None
    return retriever.GpuRetriever()
