"""Retrieval of the decode loop: equally many queries, few, of every sequence, step after step.

Launching its kernels one by one takes longer than they do. They are launched as one CUDA graph, which is captured when
a batch of its shape first comes and has tensors of its own; replies are copies of them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from memstore.gpu import few, launch
from memstore.gpu.capturing import capturing
from memstore.gpu.coded import reads_codes
from memstore.gpu.launch import Asked, Found, Located
from memstore.gpu.rings import AlikeRings, TableSizes
from memstore.gpu.room import Field, ReplyRoom
from memstore.gpu.tuning import scan_shape
from memstore.types import Hits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import RetrieveOptions

MOST_QUERIES = 16
"""Of one ring."""

MOST_ROWS = 16_384
"""Rows that the windows of a batch ask for, repeats counted: the graph has room for up to twice as many."""

MOST_GRAPHS = 16
"""Graphs that are kept; the one that was not used for longest goes first."""

CAPTURE_ERRORS = range(900, 910)
"""cudaErrorStreamCaptureUnsupported and those after it, the codes of a capture that did not come about."""

ROW_SPLITS, POSITIONS, INDEX, SCORES = ":row_splits", ":positions", ":index", ":scores"
"""Fields of a reply beside its arrays, none of which has a colon in its name."""


def is_decode(batch: SearchBatch, options: RetrieveOptions) -> bool:
    """Whether a batch is of the kind that graphs are for."""
    num_rows = batch.queries.shape[0] * batch.queries.shape[1] * batch.top_k * options.window
    return len(set(batch.counts)) == 1 and 0 < batch.counts[0] <= MOST_QUERIES and num_rows <= MOST_ROWS


class _Kind(NamedTuple):
    """What batches have in common that one graph serves. num_rings, num_supers: the graph has room for so many."""

    num_rings: int
    num_queries: int
    num_supers: int
    dtype: torch.dtype
    options: RetrieveOptions

    @classmethod
    def of(cls, slab: Slab, batch: SearchBatch, options: RetrieveOptions) -> _Kind:
        """Sizes are powers of two, so that few graphs are captured while rings fill and batches vary."""
        num_supers = _power_of_two(launch.num_supers_of(slab, batch.ends))
        return cls(
            num_rings=_power_of_two(len(batch.layers) * len(batch.places)),
            num_queries=batch.counts[0],
            num_supers=min(num_supers, launch.num_supers_of(slab, (slab.capacity,))),
            dtype=batch.queries.dtype,
            options=options,
        )


class DecodeGraphs:
    """The graphs of one memory. For one thread at a time."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[_Kind, _Graph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def retrieve(
        self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]
    ) -> Hits | None:
        """See VectorIndex.retrieve. None where no graph could be captured this time."""
        kind = _Kind.of(slab, batch, options)
        graph = self._graphs.get(kind) or self._captured(slab, kind)
        if graph is None:
            return None
        self._graphs.move_to_end(kind)
        return graph.retrieve(slab, batch, groups)

    def _captured(self, slab: Slab, kind: _Kind) -> _Graph | None:
        """A new graph; None where something else in this process has spoilt the capture, which harms nothing."""
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            graph = self._graphs[kind] = _Graph(slab, kind)
        except torch.AcceleratorError as error:
            if getattr(error, "error_code", None) not in CAPTURE_ERRORS:
                raise
            return None
        return graph


class _Graph:
    """One captured retrieval and the tensors that it works on. Rings beyond those of a batch see nothing."""

    def __init__(self, slab: Slab, kind: _Kind) -> None:
        """Raises torch.OutOfMemoryError, and then nothing is kept."""
        sizes = TableSizes(kind.num_rings, kind.num_rings, kind.num_rings * kind.num_queries)
        self._kind = kind
        self._tables_on_host = AlikeRings(sizes)
        self._tables = self._tables_on_host.flat.to(slab.device)
        self._asked = Asked(
            queries=torch.zeros((sizes.num_queries, slab.dim), dtype=kind.dtype, device=slab.device),
            tables=sizes.split(self._tables),
            sizes=sizes,
            shape=scan_shape(slab.dim, slab.keys.dtype, kind.dtype, kind.num_queries),
            top_k=kind.options.top_k,
            num_supers=kind.num_supers,
            window_before=kind.options.window_before,
            window=kind.options.window,
            is_coded=reads_codes(slab, kind.options.top_k, kind.num_queries),
        )
        self._reply = ReplyRoom(_fields(slab, self._asked, kind.options))
        self._flat = torch.zeros(self._reply.num_bytes, dtype=torch.uint8, device=slab.device)
        self._num_rows = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._num_rows_on_host = self._num_rows.numpy()
        self._row_shapes = {name: tuple(slab.array(name).shape[1:]) for name in kind.options.arrays}
        self._found, self._located = self._targets()
        self._shared = few.shared_for(self._asked) if few.is_few(self._asked) else None
        self._graph = torch.cuda.CUDAGraph()
        self._run(slab)  # what has to be compiled cannot be captured
        torch.cuda.current_stream(slab.device).synchronize()
        with capturing(self._graph, slab.device):
            self._run(slab)

    def retrieve(self, slab: Slab, batch: SearchBatch, groups: NDArray[np.int64]) -> Hits:
        """See VectorIndex.retrieve."""
        self._tables_on_host.lay(slab, batch, groups.reshape(-1))
        num_layers, num_queries, dim = batch.queries.shape
        asked = self._asked.queries
        if len(asked) != num_layers * num_queries:
            asked = asked[: num_layers * num_queries]
        asked.view(num_layers, num_queries, dim).copy_(batch.queries)
        self._graph.replay()
        flat = self._flat.clone()
        torch.cuda.current_stream(slab.device.index).synchronize()
        num_rows, hits = int(self._num_rows_on_host[0]), (num_layers, num_queries, batch.top_k)
        options = self._kind.options
        shapes = {ROW_SPLITS: (groups.size + 1,), POSITIONS: (num_rows,), INDEX: (*hits, options.window), SCORES: hits}
        for name in options.arrays:
            shapes[name] = (num_rows, *self._row_shapes[name])
        if options.omit_scores:
            del shapes[SCORES]
        found = self._reply.begins(flat, shapes)
        return Hits(
            row_splits=found[ROW_SPLITS],
            positions=found[POSITIONS],
            index=found[INDEX],
            scores=found.get(SCORES),
            arrays={name: found[name] for name in options.arrays},
        )

    def _run(self, slab: Slab) -> None:
        self._tables.copy_(self._tables_on_host.flat, non_blocking=True)
        copies = {name: self._reply.view(self._flat, name) for name in self._kind.options.arrays}
        if self._shared is not None:
            few.retrieve(slab, self._asked, self._shared, self._found.scores, self._located, copies)
        else:
            launch.search(slab, self._asked, self._found, is_clearing=True)
            launch.locate(slab, self._asked, self._found, self._located)
            for name, copy in copies.items():
                launch.gather(slab, name, self._located, copy)
        self._num_rows.copy_(self._located.row_splits[-1:], non_blocking=True)

    def _targets(self) -> tuple[Found, Located]:
        """Where the kernels write: into the reply, and beside it what is not part of one."""
        found, located = launch.found_for(self._asked), launch.located_for(self._asked)
        row_splits, positions, index, scores = (
            self._reply.view(self._flat, name) for name in (ROW_SPLITS, POSITIONS, INDEX, SCORES)
        )
        return (
            found._replace(scores=scores),
            replace(located, row_splits=row_splits, positions=positions, index=index),
        )


def _power_of_two(number: int) -> int:
    """The least one that is not below a positive number."""
    return 1 << (number - 1).bit_length()


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
