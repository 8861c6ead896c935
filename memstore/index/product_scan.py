"""Search by matrix products: the scores of whole rings, then the best of them. On every device."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from memstore import ring
from memstore.index.base import SCRATCH_BYTES
from memstore.index.tiles import best_slots
from memstore.types import Metric

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memstore.index.grid import Grid
    from memstore.slab import Slab

HOST_BLOCK = 4096
"""Rows multiplied at a time on the host: few, so that they stay in a cache; many, so that its threads seldom meet."""

NUM_PARTS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}
"""16-bit numbers of the other kind that are together as precise as one number of this kind."""


class ProductScan:
    """Scores are ranked as query.row - |row|^2 / 2 for l2, so without the part that is the same for all rows."""

    def __init__(self) -> None:
        self._host_scratch = torch.empty(0)

    def search(self, slab: Slab, layer: int, grid: Grid, queries: torch.Tensor, top_k: int) -> torch.Tensor:
        """Candidates of a grid. queries: (P, n, dim). Gives (P, n, at most top_k) int64 positions, -1 for none."""
        num_slots = min(max(grid.ends), slab.capacity)
        num_places, num_queries, _ = queries.shape
        found = torch.full((num_places, num_queries, min(top_k, num_slots)), -1, device=queries.device)
        for places, columns in _blocks(slab, num_places, num_queries, num_slots):
            seen = _Seen(grid, places, num_slots, slab)
            first = grid.first_place + places.start
            rows = (layer, slice(first, first + places.stop - places.start), slice(num_slots))
            scores = self._scores(slab, rows, queries[places, columns])
            seen.mask(scores)
            _, slots = best_slots(scores, top_k)
            found[places, columns] = seen.positions(slots)
        return found

    def _scores(self, slab: Slab, rows: tuple[int, slice, slice], queries: torch.Tensor) -> torch.Tensor:
        """(G, slots, n) float32 of G places. rows: where they are in the slab; queries: (G, n, dim)."""
        keys = slab.keys[rows]
        if slab.is_on_host:
            products = self._host_products(keys, queries.float())
        elif keys.dtype == torch.float32:
            with _ieee_products():
                products = torch.bmm(keys, queries.float().mT)
        else:
            products = _half_products(keys, queries)
        if slab.norms is None:
            return products
        norms = slab.norms[rows][..., None]
        return products.sub_(norms / 2) if slab.metric is Metric.L2 else products.mul_(norms)

    def _host_products(self, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Block by block in scratch that is kept: fresh pages would cost as much as the arithmetic."""
        num_places, num_slots, dim = keys.shape
        num_queries = queries.shape[1]
        num_products = num_places * num_slots * num_queries
        if self._host_scratch.numel() < num_products + HOST_BLOCK * dim:
            self._host_scratch = torch.empty(num_products + HOST_BLOCK * dim)
        products = self._host_scratch[:num_products].view(num_places, num_slots, num_queries)
        upcast = self._host_scratch[num_products : num_products + HOST_BLOCK * dim].view(HOST_BLOCK, dim)
        for place in range(num_places):
            for first in range(0, num_slots, HOST_BLOCK):
                block = keys[place, first : first + HOST_BLOCK]
                if block.dtype != torch.float32:
                    block = upcast[: len(block)].copy_(block)
                torch.mm(block, queries[place].T, out=products[place, first : first + len(block)])
        return products


class _Seen:
    """Which slots of some places of a grid the queries see."""

    def __init__(self, grid: Grid, places: slice, num_slots: int, slab: Slab) -> None:
        begins, ends = grid.begins[places], grid.ends[places]
        self._is_all = all(end - begin == num_slots for begin, end in zip(begins, ends, strict=True))
        self._begin = torch.tensor(begins, device=slab.device)[:, None]
        self._end = torch.tensor(ends, device=slab.device)[:, None]
        self._capacity = slab.capacity

    def mask(self, scores: torch.Tensor) -> None:
        """Takes out, of (G, slots, n) scores, those of slots that are not seen."""
        if not self._is_all:
            slots = torch.arange(scores.shape[1], device=scores.device)
            is_seen = ring.newest_positions(slots, self._end, self._capacity) >= self._begin
            scores.masked_fill_(~is_seen[..., None], -torch.inf)

    def positions(self, slots: torch.Tensor) -> torch.Tensor:
        """(G, n, k) slots -> positions, -1 for what is not seen."""
        positions = ring.newest_positions(slots, self._end[..., None], self._capacity)
        return positions.masked_fill_(positions < self._begin[..., None], -1)


def _blocks(slab: Slab, num_places: int, num_queries: int, num_slots: int) -> Iterator[tuple[slice, slice]]:
    """Places and queries that are done at a time, so that the scratch is bounded."""
    budget = SCRATCH_BYTES[slab.device.type]
    if slab.is_on_host:
        each_query, each_place = 4 * num_slots, 0
    else:
        # the scores in up to three parts, their sum and its copy by tiles; the rows in float32 do not coexist with them
        each_query, each_place = 20 * num_slots, 4 * num_slots * slab.dim
    queries = min(max((budget - each_place) // each_query, 1), num_queries)
    places = min(max(budget // (each_place + queries * each_query), 1), num_places)
    for place in range(0, num_places, places):
        for query in range(0, num_queries, queries):
            yield slice(place, min(place + places, num_places)), slice(query, min(query + queries, num_queries))


def _half_products(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Products of 16-bit rows with queries of any precision, on tensor cores, summed in float32."""
    if queries.dtype == keys.dtype:
        return torch.bmm(keys, queries.mT, out_dtype=torch.float32)
    parts, exponents = in_parts(queries, keys.dtype)
    products = torch.bmm(keys, parts.mT, out_dtype=torch.float32)
    summed = products.view(*products.shape[:2], -1, queries.shape[1]).sum(2)
    return torch.ldexp(summed, exponents.mT)


def in_parts(queries: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries as sums of 16-bit parts, together as precise as float32, times powers of two.

    queries: (G, n, dim). Gives the parts, (G, parts * n, dim), all first parts first, and the exponents, (G, n, 1).
    They are scaled such that what float16 cannot represent is below float32's rounding of a query's largest element.
    """
    rest = queries.float()
    exponents = torch.frexp(rest.abs().amax(-1, keepdim=True)).exponent.clamp(min=-100) - 15
    rest = torch.ldexp(rest, -exponents)
    parts = []
    for _ in range(NUM_PARTS[queries.dtype]):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.cat(parts, 1), exponents


@contextmanager
def _ieee_products() -> Iterator[None]:
    """No TF32 within; what was set before holds again afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
