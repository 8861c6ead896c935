"""Retrieval in stages, each over the whole batch: search, windows, distinct rows, their gather. For every index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore import ring
from memstore.types import Hits
from memstore.window import distinct_rows, window_offsets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memstore.index.base import VectorIndex
    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import RetrieveOptions


def staged_retrieve(
    index: VectorIndex, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]
) -> Hits:
    """What VectorIndex.retrieve gives, out of what `index.search` gives."""
    positions, scores = index.search(slab, batch)
    ranges, query_groups = batch.per_query(np.array([batch.begins, batch.ends]), groups)
    begin, end = ranges.unbind()  # which is quicker than to unpack
    offsets = window_offsets(positions, begin, end, options.window_before, options.window_after)
    rows = distinct_rows(offsets, query_groups, groups.size, slab.capacity)

    of_group = np.empty((2, groups.size), np.int64)
    of_group[0, groups] = batch.begins
    of_group[1, groups] = slab.first_cells(batch.layers, batch.places)
    begins, first_cells = torch.from_numpy(of_group).to(slab.device).index_select(1, rows.groups).unbind()
    row_positions = rows.offsets + begins
    cells = first_cells + ring.slot_of(row_positions, slab.capacity)
    return Hits(
        row_splits=rows.row_splits,
        positions=row_positions,
        index=rows.index,
        scores=None if options.omit_scores else scores,
        arrays={name: slab.gather(name, cells) for name in options.arrays},
    )
