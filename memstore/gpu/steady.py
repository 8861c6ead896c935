"""SteadySearch: retrievals of one kind, by kernels whose tensors stay where they are; GpuSteady: one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from memstore.gpu import few, launch
from memstore.gpu.coded import reads_codes
from memstore.gpu.launch import Asked, Found, Located
from memstore.gpu.rings import AlikeRings, TableSizes
from memstore.gpu.room import Field, ReplyRoom
from memstore.gpu.tuning import power_of_two, scan_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import RetrieveOptions

MOST_QUERIES = 16
"""Of one ring."""

MOST_ROWS = 16_384
"""Rows that the windows of a batch ask for, repeats counted: there is room for up to twice as many."""

ROW_SPLITS, POSITIONS, INDEX, SCORES = ":row_splits", ":positions", ":index", ":scores"
"""Fields of a reply beside its arrays, none of which has a colon in its name."""


def is_decode(batch: SearchBatch, options: RetrieveOptions) -> bool:
    """Whether a batch is of the decode loop: equally many queries, few, of every sequence."""
    num_rows = batch.queries.shape[0] * batch.queries.shape[1] * batch.top_k * options.window
    return len(set(batch.counts)) == 1 and 0 < batch.counts[0] <= MOST_QUERIES and num_rows <= MOST_ROWS


class Kind(NamedTuple):
    """What batches have in common that one search serves. num_rings, num_supers: there is room for so many."""

    num_rings: int
    num_queries: int
    num_supers: int
    dtype: torch.dtype
    options: RetrieveOptions

    @classmethod
    def of(cls, slab: Slab, batch: SearchBatch, options: RetrieveOptions) -> Kind:
        """Sizes are powers of two, so that kinds are few while rings fill and batches vary."""
        num_supers = power_of_two(launch.num_supers_of(slab, batch.ends))
        return cls(
            num_rings=power_of_two(len(batch.layers) * len(batch.places)),
            num_queries=batch.counts[0],
            num_supers=min(num_supers, launch.num_supers_of(slab, (slab.capacity,))),
            dtype=batch.queries.dtype,
            options=options,
        )

    @property
    def can_be_captured(self) -> bool:
        """Whether all of it is done at once."""
        return launch.has_scratch(self.num_rings * self.num_queries, self.num_supers)


class SteadySearch:
    """See above. Rings beyond those of a batch see nothing. For one thread at a time.

    queries: (queries, dim), filled before `launch`. flat: bytes of all fields of the reply, filled by it; `room` knows
    where they lie.
    """

    def __init__(self, slab: Slab, kind: Kind) -> None:
        """Raises torch.OutOfMemoryError, and then nothing is kept."""
        sizes = TableSizes(kind.num_rings, kind.num_rings, kind.num_rings * kind.num_queries)
        self.kind = kind
        self.tables_on_host = AlikeRings(sizes)
        self._tables = self.tables_on_host.flat.to(slab.device)
        self.queries = torch.zeros((sizes.num_queries, slab.dim), dtype=kind.dtype, device=slab.device)
        self._asked = Asked(
            queries=self.queries,
            tables=sizes.split(self._tables),
            sizes=sizes,
            shape=scan_shape(slab.dim, slab.keys.dtype, kind.dtype, kind.num_queries),
            top_k=kind.options.top_k,
            num_supers=kind.num_supers,
            window_before=kind.options.window_before,
            window=kind.options.window,
            is_coded=reads_codes(slab, kind.options.top_k, kind.num_queries),
        )
        self.room = ReplyRoom(_fields(slab, self._asked, kind.options))
        self.flat = torch.zeros(self.room.num_bytes, dtype=torch.uint8, device=slab.device)
        self._found, self.located = self._targets()
        self._shared = few.shared_for(self._asked) if few.is_few(self._asked) else None

    def lay(self, slab: Slab, batch: SearchBatch, groups: NDArray[np.int64]) -> None:
        """Notes on the host what the rings of a batch are; see VectorIndex.retrieve."""
        self.tables_on_host.lay(slab, batch, groups.reshape(-1))

    def send(self) -> None:
        """Has what was laid copied to the device; it stays as it is on the host until that is done."""
        self._tables.copy_(self.tables_on_host.flat, non_blocking=True)

    def send_copy(self) -> None:
        """The same by way of a copy, so that it can be laid anew at once."""
        self._tables.copy_(self.tables_on_host.flat.clone(), non_blocking=True)

    def launch(self, slab: Slab) -> None:
        """Launches the kernels, which fill `flat`; nothing waits for them."""
        copies = {name: self.field(name) for name in self.kind.options.arrays}
        if self._shared is not None:
            few.retrieve(slab, self._asked, self._shared, self._found.scores, self.located, copies)
            return
        launch.search(slab, self._asked, self._found, is_clearing=True)
        launch.locate(slab, self._asked, self._found, self.located)
        for name, copy in copies.items():
            launch.gather(slab, name, self.located, copy)

    def field(self, name: str) -> torch.Tensor:
        """A field of the reply, with all the room that it has."""
        return self.room.view(self.flat, name)

    def _targets(self) -> tuple[Found, Located]:
        """Where the kernels write: into the reply, and beside it what is not part of one."""
        found, located = launch.found_for(self._asked), launch.located_for(self._asked)
        row_splits, positions, index, scores = (self.field(name) for name in (ROW_SPLITS, POSITIONS, INDEX, SCORES))
        return (
            found._replace(scores=scores),
            replace(located, row_splits=row_splits, positions=positions, index=index),
        )


def _fields(slab: Slab, asked: Asked, options: RetrieveOptions) -> dict[str, Field]:
    num_queries, num_rows = asked.sizes.num_queries, asked.sizes.num_queries * asked.top_k * asked.window
    fields = {
        ROW_SPLITS: Field(torch.int64, (asked.sizes.num_rings + 1,)),
        POSITIONS: Field(torch.int64, (num_rows,)),
        INDEX: Field(torch.int32, (num_queries, asked.top_k, asked.window)),
        SCORES: Field(torch.float32, (num_queries, asked.top_k)),
    }
    for name in options.arrays:
        rows = slab.array(name)
        fields[name] = Field(rows.dtype, (num_rows, *rows.shape[1:]))
    return fields


class GpuSteady:
    """See index.base.Steady."""

    def __init__(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions) -> None:
        """Raises torch.OutOfMemoryError."""
        self._search = SteadySearch(slab, Kind.of(slab, batch, options))
        num_layers, num_queries, dim = batch.queries.shape
        size = num_layers * num_queries
        self.queries = self._search.queries[:size].view(num_layers, num_queries, dim)
        self.index = self._search.field(INDEX)[:size].view(num_layers, num_queries, batch.top_k, options.window)
        self.positions = self._search.field(POSITIONS)
        self.arrays: Mapping[str, torch.Tensor] = {name: self._search.field(name) for name in options.arrays}

    def fits(self, slab: Slab, batch: SearchBatch) -> bool:
        """Rings that are fuller than those it was made for need more room."""
        return Kind.of(slab, batch, self._search.kind.options) == self._search.kind

    def point(self, slab: Slab, batch: SearchBatch) -> None:
        """On the current stream."""
        self._search.lay(slab, batch, batch.groups)
        self._search.send_copy()

    def launch(self, slab: Slab) -> None:
        """On the current stream; may be captured."""
        self._search.launch(slab)
