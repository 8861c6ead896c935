"""Exact search by blocked matrix products, the same on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from memstore import ring
from memstore.index.base import SCRATCH_BYTES, SearchBatch, nothing_found, rank
from memstore.types import Metric

if TYPE_CHECKING:
    from memstore.slab import Slab


class ExactIndex:
    """See VectorIndex."""

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Searches sequence by sequence."""
        candidates, _ = nothing_found(batch)
        for sequence, first, end in batch.sequences():
            for at, layer in enumerate(batch.layers):
                found = _scan(slab, batch, layer, sequence, batch.queries[at, first:end])
                candidates[at, first:end, : found.shape[1]] = found
        return rank(slab, batch, candidates)


def _scan(slab: Slab, batch: SearchBatch, layer: int, sequence: int, queries: torch.Tensor) -> torch.Tensor:
    """The candidates of one sequence, (n, at most top_k) int64 positions."""
    queries = queries.float()
    best = torch.empty((len(queries), 0), device=queries.device)
    positions = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    step = max(SCRATCH_BYTES[slab.device.type] // (16 * max(len(queries), slab.keys.shape[-1])), 1)
    for run in ring.runs(batch.begins[sequence], batch.ends[sequence], slab.capacity):
        for offset in range(0, run.length, step):
            slots = slice(run.slot + offset, run.slot + min(offset + step, run.length))
            scores = _block_scores(slab, layer, batch.places[sequence], slots, queries)
            top = scores.topk(min(batch.top_k, scores.shape[1]))
            best = torch.cat((best, top.values), 1)
            positions = torch.cat((positions, top.indices + (run.position + offset)), 1)
            kept = best.topk(min(batch.top_k, best.shape[1]))
            best, positions = kept.values, positions.gather(1, kept.indices)
    return positions


def _block_scores(slab: Slab, layer: int, place: int, slots: slice, queries: torch.Tensor) -> torch.Tensor:
    """Scores up to a constant of each query, (n, slots) float32."""
    products = queries @ slab.keys[layer, place, slots].float().T
    if slab.norms is None:
        return products
    norms = slab.norms[layer, place, slots]
    return products.mul_(2).sub_(norms) if slab.metric is Metric.L2 else products.mul_(norms)
