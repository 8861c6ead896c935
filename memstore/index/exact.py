"""Exact search by the way that is fastest on the slab's device: compiled kernels, or matrix products in torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from memstore.index.base import Stateless, no_candidates
from memstore.index.grid import grids
from memstore.index.product_scan import ProductScan
from memstore.index.ranking import rank
from memstore.index.staged import staged_retrieve
from memstore.logs import event

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from memstore.host.retriever import HostRetriever
    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import Hits, RetrieveOptions

_log = logging.getLogger(__name__)


def prepare(device: torch.device) -> None:
    """Has what searches on a device need compiled, so that none waits for it."""
    if device.type != "cpu":
        return
    try:
        from memstore.host.warming import warm
    except ImportError as error:
        event(_log, logging.WARNING, "numba cannot be used: search is several times slower", reason=error)
    else:
        warm()


class ExactIndex(Stateless):
    """See VectorIndex."""

    def __init__(self) -> None:
        self._products = ProductScan()
        self._host = _host_retriever()

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Searches all sequences at once, or as many as the scratch has room for."""
        if slab.device.type == "cpu" and self._host is not None:
            return self._host.search(slab, batch)
        candidates = no_candidates(batch)
        for grid in grids(slab, batch):
            for at, layer in enumerate(batch.layers):
                found = self._products.search(slab, layer, grid, grid.spread(batch.queries[at]), batch.top_k)
                candidates[at, grid.columns, : found.shape[2]] = grid.collect(found)
        return rank(slab, batch, candidates)

    def retrieve(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]) -> Hits:
        """In one go where there are kernels for it, else stage by stage."""
        if slab.device.type == "cpu" and self._host is not None:
            return self._host.retrieve(slab, batch, options, groups)
        return staged_retrieve(self, slab, batch, options, groups)

    def close(self) -> None:
        """Lets go of the slab and of the threads that helped with it."""
        if self._host is not None:
            self._host.close()


def _host_retriever() -> HostRetriever | None:
    """None where numba cannot be used."""
    try:
        from memstore.host.retriever import HostRetriever
    except ImportError:
        return None
    return HostRetriever()
