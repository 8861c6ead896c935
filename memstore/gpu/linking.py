"""The links of rows: of the nearest ones of each, by exact search, those that no detour leads to, and both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore import ring
from memstore.gpu.kernels.graphs import join_kernel, link_kernel
from memstore.gpu.ranges import scan_many
from memstore.gpu.retriever import GpuRetriever, asked_for
from memstore.gpu.tuning import MOST_HITS, power_of_two
from memstore.search import SearchBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memstore.slab import Slab

SCORES_TOGETHER = 1 << 29
"""Rows times queries of one search: a millisecond of an H200."""

LEAST_QUERIES, MOST_QUERIES = 512, 2048
"""Of one search."""

LINKED_TOGETHER = 1 << 18
"""Rows whose links are chosen by one launch."""


def nearest_rows(
    slab: Slab, layer: int, place: int, rows: tuple[int, int], num: int, check: Callable[[], None]
) -> torch.Tensor:
    """(n, num) int32: of the positions [first, end) the nearest others of each, counted from `first`; -1 for none.

    The nearest come first, by the slab's metric. check: called between searches.
    """
    first, end = rows
    found = torch.empty((end - first, num), dtype=torch.int32, device=slab.device)
    retriever, keys = GpuRetriever(), slab.keys[layer, place]
    step = min(num_queries_of(end - first), end - first)
    for at in range(first, end, step):
        check()
        begin = min(at, end - step)  # the last ones with some of those before: always as many, by the same kernels
        positions = torch.arange(begin, begin + step, device=slab.device)
        batch = SearchBatch(
            queries=keys.index_select(0, ring.slot_of(positions, slab.capacity))[None],
            layers=(layer,),
            places=(place,),
            counts=(len(positions),),
            begins=(first,),
            ends=(end,),
            top_k=num + 1,
        )
        near = retriever.search(slab, batch)[0][0]
        is_self = near == positions[:, None]
        others = near.gather(1, is_self.byte().argsort(dim=1, stable=True))[:, :num]
        found[begin - first : begin - first + step] = torch.where(others < 0, -1, others - first)
    return found


def prepare(slab: Slab, num: int, num_rows: int) -> None:
    """Compiles what `nearest_rows` of so many rows needs. slab: with one ring, whatever is in it."""
    count = num_queries_of(num_rows)
    batch = SearchBatch(
        queries=slab.keys[:1, 0, :1].expand(1, count, -1),
        layers=(0,),
        places=(0,),
        counts=(count,),
        begins=(0,),
        ends=(slab.capacity,),
        top_k=num + 1,
    )
    scan_many(slab, asked_for(slab, batch, np.zeros((1, 1), np.int64), None))


def num_queries_of(num_rows: int) -> int:
    """How many queries of so many rows are searched for together."""
    return max(LEAST_QUERIES, min(MOST_QUERIES, power_of_two(SCORES_TOGETHER // max(num_rows, 1) + 1) // 2))


def num_nearest(num_links: int) -> int:
    """Of how many of its nearest rows a row's links are chosen."""
    return min(2 * num_links, MOST_HITS) - 1


def linked(nearest: torch.Tensor, num_links: int, check: Callable[[], None]) -> torch.Tensor:
    """(n, num_links) int32 links of rows, -1 for none. nearest: (n, num) int32, see nearest_rows."""
    num_rows, num = nearest.shape
    num_links = min(num_links, num)
    forth = torch.empty((num_rows, num_links), dtype=torch.int32, device=nearest.device)
    for some in _pieces(num_rows):
        check()
        link_kernel[(len(some),)](nearest, forth, some.start, NEAREST=num, WIDTH=power_of_two(num), LINKS=num_links)
    check()
    back = _back(forth)
    joined = torch.empty_like(forth)
    for some in _pieces(num_rows):
        check()
        join_kernel[(len(some),)](forth, back, joined, some.start, LINKS=num_links, WIDTH=power_of_two(num_links))
    return joined


def _back(forth: torch.Tensor) -> torch.Tensor:
    """(n, links) int32: the rows that have a link to each row, those of the best places first; -1 for none."""
    num_rows, num_links = forth.shape
    ends = forth.T.reshape(-1)
    ordered, order = ends.sort(stable=True)
    counts = torch.zeros(num_rows + 1, dtype=torch.int64, device=forth.device)
    counts.scatter_add_(0, ordered.long() + 1, torch.ones_like(order))  # those of no link come first
    rank = torch.arange(len(order), device=forth.device) - (counts.cumsum(0) - counts)[ordered.long() + 1]
    back = torch.full((num_rows * num_links + 1,), -1, dtype=torch.int32, device=forth.device)
    is_kept = (ordered >= 0) & (rank < num_links)
    at = rank.add(ordered, alpha=num_links)  # in 64 bits, as rank has
    back[torch.where(is_kept, at, num_rows * num_links)] = (order % num_rows).int()
    return back[:-1].view(num_rows, num_links)


def _pieces(num_rows: int) -> Iterator[range]:
    for first in range(0, num_rows, LINKED_TOGETHER):
        yield range(first, min(first + LINKED_TOGETHER, num_rows))
