"""The final ranking of candidates, the same after every way of searching: the one place where a score is made.

On the host that is compiled, and a part of compiled search: see host/merge.py.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from memstore import ring
from memstore.index.base import ONE_THREAD
from memstore.slab import inverse_norms
from memstore.types import Metric

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.search import SearchBatch
    from memstore.slab import Slab

ELEMENTS = {"cpu": 2 << 20, "cuda": 64 << 20}
"""Elements of the rows that are scored at a time, by type of device."""


def rank(slab: Slab, batch: SearchBatch, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores candidates from their rows and sorts them, best first. Gives what VectorIndex.search gives.

    candidates: (L, N, k) int64 positions, -1 for none, without repeats in a query.
    """
    compiled = _compiled() if slab.is_on_host else None
    if compiled is not None:
        return compiled(slab, batch, candidates)
    positions = candidates.sort(-1).values  # so that the stable sort below puts lower positions first
    (first_cells,) = batch.per_query(slab.first_cells(batch.layers, batch.places))
    # a position of -1 stands for the last slot, which is read in vain
    cells = (first_cells[..., None] + ring.slot_of(positions, slab.capacity)).flatten(0, 1)
    queries = batch.queries.flatten(0, 1)
    scores = torch.empty(cells.shape, device=cells.device)
    step = _block(slab, cells)
    for first in range(0, len(queries), step):
        block = slice(first, first + step)
        scores[block] = _scores(slab, queries[block], cells[block])
    scores = scores.view(positions.shape).masked_fill_(positions < 0, -torch.inf)
    scores, order = scores.sort(stable=True, dim=-1, descending=True)
    return positions.gather(-1, order), scores


@cache
def _compiled() -> Callable[[Slab, SearchBatch, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None:
    """None where numba cannot be used."""
    try:
        from memstore.host.retriever import rank
    except ImportError:
        return None
    return rank


def _block(slab: Slab, cells: torch.Tensor) -> int:
    """Queries to score at a time: a few on the host in one thread, which takes less than to wake the others."""
    elements = ELEMENTS[slab.device.type]
    if slab.is_on_host and cells.numel() * slab.dim <= elements // 2:
        elements = ONE_THREAD
    return max(elements // (slab.dim * cells.shape[1]), 1)


def _scores(slab: Slab, queries: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """(n, dim) queries, (n, k) cells of the whole slab -> (n, k) float32."""
    rows = slab.keys.flatten(0, 2).index_select(0, cells.flatten()).float().view(*cells.shape, slab.dim)
    queries = queries.float()[:, None]
    if slab.metric is Metric.L2:
        distances: torch.Tensor = torch.linalg.vector_norm(rows.sub_(queries), dim=-1)
        return distances.square_().neg_()
    products = rows.mul_(queries).sum(-1)
    if slab.norms is None:
        return products
    return products * slab.norms.flatten()[cells] * inverse_norms(queries)
