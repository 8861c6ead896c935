"""The search of inverted lists as kernel launches: lists chosen by their centres, their rows, and what is scanned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memstore.gpu import launch
from memstore.gpu.kernels.lists import finish_lists_kernel, score_lists_kernel
from memstore.gpu.launcher import chained
from memstore.gpu.maxima import METRICS
from memstore.gpu.ranges import joined, scanned
from memstore.gpu.rings import FANOUT
from memstore.gpu.tuning import power_of_two

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memstore.gpu.launch import Asked, Found
    from memstore.gpu.listing import ListShape
    from memstore.slab import Slab

SCRATCH_BYTES = 1 << 30
"""What the scores of rows in lists may take, or those of one query where they are more."""

FEW_QUERIES = 16
"""Up to so many, rows of a list are read 16 at a time, else 32."""

MANY_LEAVES = 2048
"""Of a query, from which on twice as many threads look for the best."""

RUNS = 4
"""That are scanned at most: what lies before and behind all generations, each in two pieces where the ring ends."""

MOST_DIMS = 256
"""Of a row, that are read at a time."""


@dataclass(frozen=True, slots=True)
class ListStore:
    """Lists of all places. centres: a slab of rings of lists; rows: (its cells, width) int32, see listing.py."""

    shape: ListShape
    centres: Slab
    rows: torch.Tensor


def search(
    slab: Slab, store: ListStore, asked: Asked, lists: Asked, runs: Sequence[Asked], found: Found
) -> torch.Tensor:
    """Fills `found`; gives (1,) int32: queries with fewer hits than there are rows to be seen.

    lists: the search for the centres; runs: the searches of what is in no list.
    """
    chosen = launch.found_for(lists)
    launch.search(store.centres, lists, chosen)
    others = [scanned(slab, asked, run) for run in runs]
    num_short = torch.zeros(1, dtype=torch.int32, device=slab.device)
    each = store.shape.num_chosen * store.shape.width * 4 * (FANOUT + 1) // FANOUT
    step = max(SCRATCH_BYTES // each, 1)
    for first in range(0, asked.sizes.num_queries, step):
        piece = slice(first, min(first + step, asked.sizes.num_queries))
        _finish(slab, store, asked, (lists, chosen), piece, joined(others), (found, num_short))
    return num_short


def _finish(
    slab: Slab,
    store: ListStore,
    asked: Asked,
    chosen: tuple[Asked, Found],
    piece: slice,
    others: tuple[torch.Tensor, torch.Tensor] | None,
    into: tuple[Found, torch.Tensor],
) -> None:
    """The hits of some queries."""
    shape, num_queries = store.shape, piece.stop - piece.start
    found, num_short = into
    leaves = shape.num_chosen * shape.width // FANOUT
    scores = torch.empty((num_queries, leaves * FANOUT), device=slab.device)
    maxima = torch.empty((num_queries, leaves), device=slab.device)
    lists = (asked.tables.rings, asked.tables.query_rings, chosen[0].tables.rings, chosen[1].offsets, store.rows)
    counts = (store.centres.capacity, shape.num_together, shape.span)
    score_lists_kernel[(num_queries, shape.num_chosen)](
        asked.queries,
        slab.keys,
        scores if slab.norms is None else slab.norms,
        *lists,
        scores,
        maxima,
        *counts,
        slab.capacity,
        shape.num_chosen,
        piece.start,
        DIM=slab.dim,
        METRIC=METRICS[slab.metric],
        WIDTH=shape.width,
        BLOCK_N=16 if asked.sizes.num_queries <= FEW_QUERIES else 32,
        BLOCK_D=min(MOST_DIMS, max(power_of_two(slab.dim), 16)),
        num_warps=4,
        **chained(slab.device),
    )
    top = max(power_of_two(asked.top_k), 2)
    num_others = 0 if others is None else others[0].shape[1]
    finish_lists_kernel[(num_queries,)](
        *lists,
        scores,
        maxima,
        torch.empty((num_queries, top), dtype=torch.int32, device=slab.device),
        *((found.offsets, found.scores) if others is None else others),
        found.offsets,
        found.scores,
        found.bitmap,
        num_short,
        *counts,
        shape.num_chosen,
        num_others,
        found.bitmap.shape[1],
        piece.start,
        asked.top_k,
        asked.window_before,
        asked.window,
        WIDTH=shape.width,
        LEAVES=max(power_of_two(leaves), top),
        OTHERS=RUNS * top if num_others else 0,
        TOP=top,
        num_warps=8 if leaves > MANY_LEAVES else 4,
        **chained(slab.device),
    )
