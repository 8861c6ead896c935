"""Ranges: what sequences see of their generations, and of the positions before and behind them, which are scanned."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from memstore.gpu import launch
from memstore.gpu.rings import SUPER_SLOTS, Ring

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from memstore.gpu.launch import Asked, Found
    from memstore.search import SearchBatch
    from memstore.slab import Slab


WARM_SUPERS = (16, 32, 64, 128, 256, 512)
"""Sizes of the rings that are scanned beforehand."""


class Ranges(NamedTuple):
    """What each sequence of a batch sees, all (S, 2) int64: generations by number, and positions that are scanned."""

    generations: NDArray[np.int64]
    scanned: tuple[NDArray[np.int64], ...]


def runs_of(batch: SearchBatch, ranges: Ranges, capacity: int) -> list[SearchBatch]:
    """What is scanned, as searches of neighbouring slots; those in which no sequence sees anything are left out."""
    cut: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for begins, ends in (scanned.T for scanned in ranges.scanned):
        middles = np.minimum(ends, (begins // capacity + 1) * capacity)
        cut += [(begins, middles), (middles, ends)]
    return [
        replace(batch, begins=tuple(begins.tolist()), ends=tuple(ends.tolist()))
        for begins, ends in cut
        if (begins != ends).any()
    ]


def num_supers_of_run(run: SearchBatch) -> int:
    """Supers of the longest one."""
    longest = max((end - begin for begin, end in zip(run.begins, run.ends, strict=True)), default=0)
    return max(-(-longest // SUPER_SLOTS), 1)


def scanned(slab: Slab, asked: Asked, run: Asked) -> Found:
    """Hits in a run, their offsets from the first position that the batch sees."""
    found = launch.found_for(run)
    launch.search(slab, run, found)
    apart = run.tables.rings[:, Ring.BEGIN] - asked.tables.rings[:, Ring.BEGIN]
    offsets = found.offsets + apart.int()[asked.tables.query_rings][:, None]
    return found._replace(offsets=torch.where(found.offsets < 0, -1, offsets))


def joined(some: Sequence[Found]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All hits of each query: offsets and scores, (Q, n of all)."""
    if len(some) < 2:
        return (some[0].offsets, some[0].scores) if some else None
    return torch.cat([found.offsets for found in some], 1), torch.cat([found.scores for found in some], 1)


def scan_many(slab: Slab, asked: Asked) -> None:
    """Searches once in rings of every size for which there are other kernels, so that these are compiled."""
    for num_supers in WARM_SUPERS:
        sized = replace(asked, num_supers=num_supers)
        launch.search(slab, sized, launch.found_for(sized))
