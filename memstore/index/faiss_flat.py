"""FAISS brute force over the slab: faiss.knn on the host, faiss.knn_gpu on CUDA. The reference for other indexes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memstore import ring
from memstore.errors import InvalidRequest
from memstore.index.base import Stateless, no_candidates
from memstore.index.ranking import rank
from memstore.index.staged import staged_retrieve
from memstore.slab import inverse_norms
from memstore.types import Metric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import Hits, RetrieveOptions


class FaissFlatIndex(Stateless):
    """See VectorIndex. Raises InvalidRequest at creation where FAISS is not installed."""

    def __init__(self) -> None:
        try:
            import faiss
        except ImportError as error:
            raise InvalidRequest("spec.index", "faiss_flat needs faiss, which is not installed here") from error
        self._faiss: Any = faiss
        self._resources: Any = None

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Searches run by run of each sequence in each layer."""
        candidates = no_candidates(batch)
        for sequence, first, end in batch.sequences():
            for at, layer in enumerate(batch.layers):
                found = self._scan(slab, batch, layer, sequence, batch.queries[at, first:end].float())
                candidates[at, first:end, : found.shape[1]] = found
        return rank(slab, batch, candidates)

    def retrieve(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]) -> Hits:
        """Searches, and stage by stage does the rest."""
        return staged_retrieve(self, slab, batch, options, groups)

    def _scan(self, slab: Slab, batch: SearchBatch, layer: int, sequence: int, queries: torch.Tensor) -> torch.Tensor:
        """The candidates of one sequence, (n, at most top_k) int64 positions."""
        best = torch.empty((len(queries), 0), device=queries.device)
        positions = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
        for run in ring.runs(batch.begins[sequence], batch.ends[sequence], slab.capacity):
            cells = (layer, batch.places[sequence], slice(run.slot, run.slot + run.length))
            rows = slab.keys[cells].float()
            if slab.metric is Metric.COSINE:
                rows = rows * inverse_norms(rows)[:, None]
            scores, slots = self._knn(slab.metric, queries, rows, min(batch.top_k, run.length))
            best = torch.cat((best, scores), 1)
            positions = torch.cat((positions, slots + run.position), 1)
        kept = best.topk(min(batch.top_k, best.shape[1]))
        return positions.gather(1, kept.indices)

    def _knn(
        self, metric: Metric, queries: torch.Tensor, rows: torch.Tensor, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores, larger is better, and slots of one run, both (n, top_k) on the queries' device."""
        faiss = self._faiss
        kind = faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
        if queries.device.type == "cpu":
            found = faiss.knn(queries.numpy(), rows.numpy(), top_k, metric=kind)
            scores, slots = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        else:
            scores, slots = self._knn_gpu(queries, rows, top_k, kind)
        return (-scores if metric is Metric.L2 else scores), slots

    def _knn_gpu(
        self, queries: torch.Tensor, rows: torch.Tensor, top_k: int, kind: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import faiss.contrib.torch_utils

        if self._resources is None:
            self._resources = faiss.StandardGpuResources()
        found: tuple[torch.Tensor, torch.Tensor] = faiss.knn_gpu(
            self._resources, queries.contiguous(), rows, top_k, metric=kind, device=queries.device.index or 0
        )
        return found
