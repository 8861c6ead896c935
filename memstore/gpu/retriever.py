"""GpuRetriever: exact search and retrieval on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore.gpu import launch
from memstore.gpu.coded import reads_codes
from memstore.gpu.decode import DecodeGraphs
from memstore.gpu.launch import Asked, Found, Located
from memstore.gpu.rings import tables
from memstore.gpu.steady import GpuSteady, Kind, is_decode
from memstore.gpu.tuning import scan_shape
from memstore.types import Hits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import RetrieveOptions


class GpuRetriever:
    """For one thread at a time."""

    def __init__(self) -> None:
        self._graphs = DecodeGraphs()

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See VectorIndex.search."""
        asked = asked_for(slab, batch, batch.groups, None)
        found = launch.found_for(asked)
        launch.search(slab, asked, found)
        return positions_of(batch, found)

    def retrieve(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]) -> Hits:
        """See VectorIndex.retrieve."""
        if is_decode(batch, options) and (hits := self._graphs.retrieve(slab, batch, options, groups)):
            return hits
        asked = asked_for(slab, batch, groups, options)
        found, located = launch.found_for(asked), launch.located_for(asked)
        launch.search(slab, asked, found)
        launch.locate(slab, asked, found, located)
        return hits_of(slab, batch, options, found, located)

    def steady(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions) -> GpuSteady | None:
        """See VectorIndex.steady."""
        is_able = is_decode(batch, options) and Kind.of(slab, batch, options).can_be_captured
        return GpuSteady(slab, batch, options) if is_able else None

    def close(self) -> None:
        """Lets go of the graphs, and with them of what they work on."""
        self._graphs = DecodeGraphs()


def hits_of(slab: Slab, batch: SearchBatch, options: RetrieveOptions, found: Found, located: Located) -> Hits:
    """The reply to a batch, its rows gathered. Waits for the device, to learn how many there are."""
    num_rows = int(located.row_splits[-1])
    shape = (*batch.queries.shape[:2], batch.top_k)
    return Hits(
        row_splits=located.row_splits,
        positions=located.positions[:num_rows],
        index=located.index.view(*shape, options.window),
        scores=None if options.omit_scores else found.scores.view(shape),
        arrays={name: _gathered(slab, name, located, num_rows) for name in options.arrays},
    )


def positions_of(batch: SearchBatch, found: Found) -> tuple[torch.Tensor, torch.Tensor]:
    """What VectorIndex.search gives."""
    (begins,) = batch.per_query(np.array([batch.begins]))
    shape = (*batch.queries.shape[:2], batch.top_k)
    offsets = found.offsets.view(shape)
    return torch.where(offsets < 0, -1, begins[0, :, None] + offsets), found.scores.view(shape)


def _gathered(slab: Slab, name: str, located: Located, num_rows: int) -> torch.Tensor:
    source = slab.array(name)
    rows = torch.empty((num_rows, *source.shape[1:]), dtype=source.dtype, device=slab.device)
    launch.gather(slab, name, located, rows)
    return rows


def asked_for(slab: Slab, batch: SearchBatch, groups: NDArray[np.int64], options: RetrieveOptions | None) -> Asked:
    """options: None where no windows are wanted."""
    most_queries = max(batch.counts, default=0)
    shape = scan_shape(slab.dim, slab.keys.dtype, batch.queries.dtype, most_queries)
    sizes, flat = tables(slab, batch, groups, shape.queries)
    return Asked(
        queries=batch.queries.flatten(0, 1).contiguous(),
        tables=sizes.split(torch.from_numpy(flat).to(slab.device, non_blocking=True)),
        sizes=sizes,
        shape=shape,
        top_k=batch.top_k,
        num_supers=launch.num_supers_of(slab, batch.ends),
        window_before=0 if options is None else options.window_before,
        window=0 if options is None else options.window,
        is_coded=reads_codes(slab, batch.top_k, most_queries),
    )
