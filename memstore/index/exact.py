"""Exact search: on the host by FAISS, thread by thread; on a GPU, and without FAISS, by matrix products in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.index.base import SearchBatch, Stateless, no_candidates
from memstore.index.grid import grids
from memstore.index.host_scan import HostScan
from memstore.index.product_scan import ProductScan
from memstore.index.ranking import rank
from memstore.index.staged import staged_retrieve

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from memstore.slab import Slab
    from memstore.types import Hits, RetrieveOptions


class ExactIndex(Stateless):
    """See VectorIndex."""

    def __init__(self) -> None:
        self._products = ProductScan()
        self._host = HostScan()

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Searches all sequences by the way that is fastest on the slab's device."""
        candidates = no_candidates(batch)
        if slab.device.type == "cpu" and self._host.is_available:
            self._host.search(slab, batch, candidates)
            return rank(slab, batch, candidates)
        for grid in grids(slab, batch):
            for at, layer in enumerate(batch.layers):
                found = self._products.search(slab, layer, grid, grid.spread(batch.queries[at]), batch.top_k)
                candidates[at, grid.columns, : found.shape[2]] = grid.collect(found)
        return rank(slab, batch, candidates)

    def retrieve(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]) -> Hits:
        """Searches, and stage by stage does the rest."""
        return staged_retrieve(self, slab, batch, options, groups)
