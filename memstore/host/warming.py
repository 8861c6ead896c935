"""Warming: all kernels compiled, or read from disk, before anybody waits for one."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch

from memstore.host.compiling import folder, tell_once
from memstore.host.grouping import add_to, add_to_nearest
from memstore.host.helpers import NONE
from memstore.host.merge import find
from memstore.host.placing import norms_of, put
from memstore.host.planning import FEW_QUERIES
from memstore.host.retriever import HostRetriever, View, rank
from memstore.logs import event
from memstore.search import SearchBatch
from memstore.slab import Slab
from memstore.types import MemorySpec, RetrieveOptions

_log = logging.getLogger(__name__)

WORTH_A_LINE_S = 2.0
"""What takes longer was compiled and not read."""


def warm() -> None:
    """Retrieves in a small slab for few and for many queries, appends, groups points; does nothing of what helpers do.

    Takes a fraction of a second where a process before this one has left compiled code, else up to a minute of a core.
    """
    if folder() is None:
        tell_once(None)
    begun = time.monotonic()
    _retrieve()
    _place()
    _group()
    seconds = time.monotonic() - begun
    if seconds > WORTH_A_LINE_S:
        event(_log, logging.INFO, "search compiled", seconds=round(seconds, 1))


def _retrieve() -> None:
    slab = Slab(MemorySpec(name="warm", dim=16, capacity=4, max_sequences=2), torch.device("cpu"))
    counts = (1, FEW_QUERIES + 1)
    batch = SearchBatch(
        queries=torch.ones(1, sum(counts), slab.dim),
        layers=(0,),
        places=(0, 1),
        counts=counts,
        begins=(0, 0),
        ends=(4, 4),
        top_k=2,
    )
    HostRetriever().retrieve(slab, batch, RetrieveOptions(top_k=2), np.arange(2).reshape(1, 2))
    rank(slab, batch, torch.zeros(1, sum(counts), 2, dtype=torch.int64))
    _help(slab, batch)


def _place() -> None:
    slab = Slab(MemorySpec(name="warm", dim=16, capacity=4), torch.device("cpu"))
    put(slab, slab.stage(torch.ones(1, 1, slab.dim), {}, norms_of), np.zeros(1, np.int64))


def _group() -> None:
    points = np.ones((1, 4), np.float32)
    sums = points.copy(), np.zeros(1, np.float32)
    add_to_nearest(points, np.ascontiguousarray(points.T), *sums)
    add_to(np.zeros(1, np.int64), points, *sums)


def _help(slab: Slab, batch: SearchBatch) -> None:
    desk = View(slab).desk(batch)
    hits = desk.result()
    for table in desk.tables(batch):
        table.begin(batch, batch.queries.data_ptr(), *hits.addresses)
        find(table.address, NONE)
        table.help(batch.queries)
        table.finish()
