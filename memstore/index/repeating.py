"""HostSteady: a retrieval that is asked again and again, by an index that has no other way than `retrieve`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memstore.index.base import VectorIndex
    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import RetrieveOptions


class HostSteady:
    """See index.base.Steady."""

    def __init__(self, index: VectorIndex, slab: Slab, batch: SearchBatch, options: RetrieveOptions) -> None:
        self._retriever = index
        self._batch = batch
        self._options = options
        num_layers, num_queries, _ = batch.queries.shape
        self._groups = np.arange(num_layers * len(batch.places)).reshape(num_layers, -1)
        self.queries = torch.zeros_like(batch.queries)
        shape = (num_layers, num_queries, batch.top_k, options.window)
        self.index = torch.full(shape, -1, dtype=torch.int32, device=slab.device)
        num_rows = self.index.numel()
        self.positions = torch.zeros(num_rows, dtype=torch.int64, device=slab.device)
        self.arrays: Mapping[str, torch.Tensor] = {
            name: torch.zeros((num_rows, *slab.array(name).shape[1:]), dtype=slab.array(name).dtype)
            for name in options.arrays
        }

    def fits(self, slab: Slab, batch: SearchBatch) -> bool:
        """There is room for whatever is found."""
        return True

    def point(self, slab: Slab, batch: SearchBatch) -> None:
        """See Steady."""
        self._batch = batch

    def launch(self, slab: Slab) -> None:
        """It is done when this returns."""
        hits = self._retriever.retrieve(slab, replace(self._batch, queries=self.queries), self._options, self._groups)
        self.index.copy_(hits.index)
        num_rows = len(hits.positions)
        self.positions[:num_rows] = hits.positions
        for name, array in self.arrays.items():
            array[:num_rows] = hits.arrays[name]
