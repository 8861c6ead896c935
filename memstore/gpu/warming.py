"""Warming: the kernels of common memories compiled before anybody waits for one, as far as the time allows."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore.errors import DeviceMemoryFull
from memstore.gpu.retriever import GpuRetriever
from memstore.logs import event
from memstore.search import SearchBatch
from memstore.slab import Slab
from memstore.types import MemorySpec, RetrieveOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)

COMMON = tuple(MemorySpec(name="warm", dim=dim, capacity=1024, max_sequences=2) for dim in (256, 128, 512, 64, 1024))
"""What most memories are, the most usual first: l2 over float16, and the widths of keys of usual models."""

OPTIONS = RetrieveOptions(top_k=16, window_after=1)
COUNTS = (1, 512)
"""Queries of each sequence: of a step of a decode loop, and of a segment."""

MOST_S = 10.0
"""No retrieval is begun after so many seconds. One compiles for some seconds where nothing is on disk."""

WORTH_A_LINE_S = 2.0


def warm(device: torch.device, now: Callable[[], float] = time.monotonic) -> None:
    """Retrieves in a small slab of each common kind, for few and for many queries.

    Triton keeps what it compiled on disk: a process after this one takes a fraction of a second for each.
    """
    begun, num_done = now(), 0
    try:
        for retrieve in _retrievals(device):
            if now() - begun > MOST_S:
                break
            retrieve()
            num_done += 1
        torch.cuda.synchronize(device)
    except (DeviceMemoryFull, RuntimeError) as error:  # whatever it is, the first steps meet it, and say so
        event(_log, logging.WARNING, "search could not be compiled beforehand", reason=error)
    if now() - begun > WORTH_A_LINE_S:
        kinds = f"{num_done} of {len(COMMON) * len(COUNTS)}"
        event(_log, logging.INFO, "search compiled for common memories", kinds=kinds, seconds=round(now() - begun, 1))


def _retrievals(device: torch.device) -> Iterator[Callable[[], object]]:
    for spec in COMMON:
        slab, retriever = Slab(spec, device), GpuRetriever()
        for count in COUNTS:
            yield partial(_retrieve, slab, retriever, count)
        retriever.close()
        slab.free()


def _retrieve(slab: Slab, retriever: GpuRetriever, count: int) -> None:
    batch = SearchBatch(
        queries=torch.zeros(1, 2 * count, slab.dim, dtype=slab.keys.dtype, device=slab.device),
        layers=(0,),
        places=(0, 1),
        counts=(count, count),
        begins=(0, 0),
        ends=(slab.capacity, slab.capacity),
        top_k=OPTIONS.top_k,
    )
    retriever.retrieve(slab, batch, OPTIONS, np.arange(2).reshape(1, 2))
