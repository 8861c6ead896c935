"""Desk: the plan of a search and what it is done on, kept for the next search of the same shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore.host import rings as columns
from memstore.host.job import NUM_LEFT, empty_job
from memstore.host.planning import plan

if TYPE_CHECKING:
    from memstore.host.job import Scratch
    from memstore.host.planning import Shape
    from memstore.host.scoring import Rows
    from memstore.search import SearchBatch

KEPT_BYTES = 1 << 20
"""Scratch that takes more is not kept: the job is so long that making it does not count."""


class Desk:
    """Steps of a decode loop find theirs as they have left it: to make it anew would take longer than many a scan.

    headers: of the jobs, see job.py; num_helpers: for each. rings: the table of rings, to be filled.
    """

    def __init__(self, shape: Shape, batch: SearchBatch, rows: Rows, coded: tuple[int, int]) -> None:
        """coded: see `plan`."""
        self.shape = shape
        num_layers, num_queries, self._dim = batch.queries.shape
        self._num_queries = num_layers * num_queries
        self.headers, self.num_helpers = plan(shape, rows, self._dim, torch.get_num_threads(), coded)
        self.rings = np.empty((num_layers * len(batch.places), columns.NUM_COLUMNS), np.int64)
        self._kept: Scratch | None = None

    def scratch(self, header: tuple[int, ...]) -> Scratch:
        """For a job; not what a helper may still look at, who has slept through the search before."""
        if self._kept is not None and self._kept.integers[NUM_LEFT] == self.num_helpers:
            return self._kept
        made = empty_job(header, self._num_queries, self._dim)
        made.integers[NUM_LEFT] = -1  # not begun yet
        is_kept = len(self.headers) == 1 and sum(array.nbytes for array in made) <= KEPT_BYTES
        self._kept = made if is_kept else None
        return made
