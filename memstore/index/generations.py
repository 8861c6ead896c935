"""GenerationIndex: old rows in generations with a FAISS index each, built in the background; the tail scanned exactly.

A row is in the tail from the moment that it is appended. When the positions of a generation are full, the build thread
makes its index out of the stored rows; the device's thread takes it over between two calls, by putting it into a list.
Until then, and for ever where no build succeeds, its rows are scanned. Generations and tail only nominate candidates.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore.index.building import Build
from memstore.index.crew import Crew
from memstore.index.exact import ExactIndex
from memstore.index.generation import Line
from memstore.index.ranking import rank
from memstore.index.settings import settings_of
from memstore.index.staged import staged_retrieve
from memstore.seams import SystemClock
from memstore.types import IndexCounts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from concurrent.futures import Executor, Future

    from numpy.typing import NDArray

    from memstore.index.generation import Generation, Part, PartBuilder, View
    from memstore.seams import Clock
    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import Hits, MemorySpec, RetrieveOptions

STREAMS = 8
"""Of a GPU, on which parts are searched side by side."""

QUERY_S = 0.002
"""What a thread of the host takes to search a generation for one query, at most, unless it is held up."""


class GenerationIndex:
    """See VectorIndex, but for what may be missed: a row that its generation does not nominate.

    As many hits are given as there are rows to be seen, up to top_k: where generations nominate too few, everything is
    scanned. The rows of a generation of which half or less is seen are scanned, too.
    """

    is_told = True

    def __init__(self, spec: MemorySpec, builder: PartBuilder, executor: Executor, clock: Clock | None = None) -> None:
        """executor: runs builds one after the other."""
        self._rows = settings_of(spec).generation_rows
        self._num_layers = spec.num_layers
        self._builder = builder
        self._executor = executor
        self._clock = clock or SystemClock()
        self._exact = ExactIndex()
        self._crew = Crew()
        self._streams: list[torch.cuda.Stream] = []
        self._lines: dict[int, Line] = {}
        self._under_way: list[tuple[Build, Future[None]]] = []
        self._done: deque[Build] = deque()
        self._remains: list[Generation] = []
        self._is_closed = False
        self._num_done = self._num_put_off = 0
        self._build_seconds = 0.0

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Nominates from generations, scans the rest, ranks all."""
        self._adopt()
        views = self._views(batch)
        if not any(view.generations for view in views):
            return self._exact.search(slab, batch)
        found = [self._nominated(slab, batch, views)]
        for ranges in ([view.front for view in views], [view.back for view in views]):
            begins, ends = zip(*ranges, strict=True)
            if begins != ends:
                found.append(self._exact.search(slab, replace(batch, begins=begins, ends=ends))[0])
        positions, scores = rank(slab, batch, torch.cat(found, -1))
        positions, scores = positions[..., : batch.top_k], scores[..., : batch.top_k]
        if _are_too_few(batch, positions):
            return self._exact.search(slab, batch)
        return positions, scores

    def retrieve(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]) -> Hits:
        """Searches, and stage by stage does the rest; as the exact index does it where no generation is seen."""
        self._adopt()
        if any(view.generations for view in self._views(batch)):
            return staged_retrieve(self, slab, batch, options, groups)
        return self._exact.retrieve(slab, batch, options, groups)

    def appended(self, slab: Slab, place: int, begin: int, end: int) -> None:
        """Drops what is dead, and begins to build what is full."""
        self._adopt()
        line = self._lines.setdefault(place, Line())
        line.begin, line.end = begin, end
        self._bury(line.drop_dead())
        while not self._is_closed and end >= line.retry_at and (positions := line.next_range(self._rows)) is not None:
            after = line.builds[-1] if line.builds else None
            build = Build(self._builder, slab, place, positions, after)
            if not self._start(build):
                return
            line.builds.append(build)

    def forgotten(self, place: int) -> None:
        """Stops builds of the place, and drops its generations."""
        line = self._lines.pop(place, Line())
        for build in line.builds:
            build.is_stopped = True
        self._bury(line.generations)

    def forked(self, slab: Slab, source: int, target: int, begin: int, end: int) -> None:
        """The target has the generations of the source that it sees to their end: they never change."""
        line = self._lines.get(source, Line())
        shared = [generation for generation in line.generations if begin < generation.end <= end]
        self._lines[target] = Line(generations=shared)
        self.appended(slab, target, begin, end)

    def counts(self) -> IndexCounts:
        """Of this moment."""
        self._adopt()
        lines = self._lines.values()
        return IndexCounts(
            num_generations=sum(len(line.generations) for line in lines),
            tail_rows=sum(line.num_scanned for line in lines) * self._num_layers,
            builds_under_way=len(self._under_way),
            builds_done=self._num_done,
            builds_put_off=self._num_put_off,
            build_seconds=self._build_seconds,
        )

    def close(self) -> None:
        """Stops all builds, and scans from now on."""
        self._is_closed = True
        for line in self._lines.values():
            for build in line.builds:
                build.is_stopped = True
            self._remains += line.generations
        self._lines = {}

    def join(self) -> None:
        """Waits for the build that is running, which ends at its next step."""
        futures = [future for _, future in self._under_way]
        wait([future for future in futures if not future.cancel()])
        self._under_way, self._done, self._remains = [], deque(), []

    def _views(self, batch: SearchBatch) -> list[View]:
        """What each sequence of a batch sees."""
        ranges = zip(batch.places, batch.begins, batch.ends, strict=True)
        return [
            self._lines.get(place, Line()).view(begin, end, can_mask=self._builder.can_mask)
            for place, begin, end in ranges
        ]

    def _nominated(self, slab: Slab, batch: SearchBatch, views: list[View]) -> torch.Tensor:
        """(L, N, candidates) int64 positions, -1 for none: the best of all generations by their own scores."""
        num = self._builder.candidates(batch.top_k)
        shares = [
            _Share.of(batch, views[sequence], sequence, slice(first, end), num)
            for sequence, first, end in batch.sequences()
            if views[sequence].generations
        ]
        pieces = [piece for share in shares for piece in share.pieces()]
        if slab.device.type == "cpu":
            patience_s = QUERY_S * max(batch.counts)
            self._crew.do(_search_all, pieces, torch.get_num_threads(), patience_s)
        else:
            self._search_on_streams(pieces)
        found = torch.full((*batch.queries.shape[:2], num), -1, dtype=torch.int64, device=slab.device)
        for share in shares:
            found[:, share.columns] = share.best()
        return found

    def _search_on_streams(self, pieces: Sequence[_Piece]) -> None:
        """Side by side, as one alone leaves most of a GPU idle."""
        if not self._streams:
            self._streams = [torch.cuda.Stream(priority=-1) for _ in range(STREAMS)]  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream()
        ready = current.record_event()
        for piece, stream in zip(pieces, cycle(self._streams), strict=False):
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                piece.search()
        for stream in self._streams[: len(pieces)]:
            current.wait_stream(stream)

    def _start(self, build: Build) -> bool:
        """Whether the build thread takes it; not where the server is stopping."""
        try:
            self._under_way.append((build, self._executor.submit(self._run, build)))
        except RuntimeError:
            return False
        return True

    def _run(self, build: Build) -> None:
        """In the build thread."""
        begun = self._clock.monotonic()
        build.run()
        build.seconds = self._clock.monotonic() - begun
        self._done.append(build)

    def _adopt(self) -> None:
        """Takes over what the build thread has done."""
        while self._done:
            done = self._done.popleft()
            self._under_way = [(build, future) for build, future in self._under_way if build is not done]
            self._build_seconds += done.seconds
            generation, done.generation = done.generation, None
            line = next((line for line in self._lines.values() if done in line.builds), None)
            if line is not None:
                line.builds.remove(done)
            if done.has_failed:
                self._num_put_off += 1
                if line is not None:
                    line.retry_at = line.end + -(-self._rows // 4)
            elif generation is not None:
                self._num_done += 1
                if line is None or done.is_stopped:
                    self._bury([generation])
                else:
                    line.generations.append(generation)

    def _bury(self, generations: list[Generation]) -> None:
        """Has the build thread let go of them: on a GPU that waits for all that is under way there."""
        if generations:
            with suppress(RuntimeError):  # the server is stopping
                self._executor.submit(generations.clear)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A search of one part, and where what it finds goes. scores, positions: (n, candidates)."""

    part: Part
    first: int
    queries: torch.Tensor
    seen: tuple[int, int]
    scores: torch.Tensor
    positions: torch.Tensor

    def search(self) -> None:
        """Doing it again does the same again."""
        scores, ids = self.part.search(self.queries, self.scores.shape[1], *self.seen)
        self.scores.copy_(scores)
        self.positions.copy_(torch.where(ids < 0, -1, ids + self.first))


@dataclass(frozen=True, slots=True)
class _Share:
    """What one sequence has its generations nominate: `num` candidates for each of its queries, in each layer."""

    batch: SearchBatch
    generations: tuple[Generation, ...]
    columns: slice
    seen: tuple[int, int]
    scores: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, batch: SearchBatch, view: View, sequence: int, columns: slice, num: int) -> _Share:
        """scores and positions: (layers, queries, generations, num)."""
        shape = (len(batch.layers), columns.stop - columns.start, len(view.generations), num)
        device = batch.queries.device
        return cls(
            batch,
            view.generations,
            columns,
            (batch.begins[sequence], batch.ends[sequence]),
            torch.empty(shape, device=device),
            torch.empty(shape, dtype=torch.int64, device=device),
        )

    def pieces(self) -> Iterator[_Piece]:
        """One for each generation in each layer."""
        begin, end = self.seen
        for at, layer in enumerate(self.batch.layers):
            queries = self.batch.queries[at, self.columns].float().contiguous()
            for number, generation in enumerate(self.generations):
                seen = max(begin, generation.first) - generation.first, min(end, generation.end) - generation.first
                scores, positions = self.scores[at, :, number], self.positions[at, :, number]
                yield _Piece(generation.parts[layer], generation.first, queries, seen, scores, positions)

    def best(self) -> torch.Tensor:
        """(layers, queries, num) positions."""
        positions = self.positions.flatten(2)
        if len(self.generations) == 1:
            return positions
        scores = self.scores.flatten(2).masked_fill(positions < 0, -torch.inf)
        return positions.gather(2, scores.topk(self.scores.shape[3], sorted=False).indices)


def _search_all(pieces: Iterable[_Piece]) -> None:
    for piece in pieces:
        piece.search()


def _are_too_few(batch: SearchBatch, positions: torch.Tensor) -> bool:
    """Whether a query has fewer hits than it can have."""
    can_be_seen = np.subtract(batch.ends, batch.begins)[None]
    (possible,) = batch.per_query(can_be_seen.clip(0, batch.top_k))
    return bool(((positions >= 0).sum(-1) < possible).any())
