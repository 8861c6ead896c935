"""GenerationIndex: old rows in generations with a FAISS index each, built in the background; the tail scanned exactly.

A row is in the tail from the moment that it is appended. When the positions of a generation are full, the build thread
makes its index out of the stored rows; the device's thread takes it over between two calls, by putting it into a list.
Until then, and for ever where no build succeeds, its rows are scanned. Generations and tail only nominate candidates.
"""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore.gpu.tuning import MOST_HITS
from memstore.index.building import Build, precedence_of
from memstore.index.exact import ExactIndex
from memstore.index.generation import Generation, Line
from memstore.index.nominating import Nominator
from memstore.index.ranking import rank
from memstore.index.settings import must_read_all, settings_of
from memstore.index.staged import staged_retrieve
from memstore.logs import trouble
from memstore.seams import SystemClock
from memstore.types import NO_ROOM, IndexCounts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor, Future

    from numpy.typing import NDArray

    from memstore.gpu.ranges import Ranges
    from memstore.index.base import Steady
    from memstore.index.generation import PartBuilder, PartRetriever, View
    from memstore.seams import Clock
    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import Hits, MemorySpec, RetrieveOptions

_log = logging.getLogger(__name__)


class GenerationIndex:
    """See VectorIndex, but for what may be missed: a row that its generation does not nominate.

    As many hits are given as there are rows to be seen, up to top_k: where generations nominate too few, everything is
    scanned. The rows of a generation of which half or less is seen are scanned, too.
    """

    is_told = True

    def __init__(
        self,
        spec: MemorySpec,
        builder: PartBuilder,
        executor: Executor,
        lists: PartRetriever | None = None,
        clock: Clock | None = None,
    ) -> None:
        """executor: runs builds one after the other. lists: keeps and searches what the builder builds, if that
        is no Part."""
        self._rows = settings_of(spec).generation_rows
        self._num_layers = spec.num_layers
        self._builder = builder
        self._executor = executor
        self._lists = lists
        self._misses_lists = lists is not None and must_read_all(spec)
        self._clock = clock or SystemClock()
        self._precedence = precedence_of(executor)
        self._exact = ExactIndex()
        self._nominator = Nominator()
        self._lines: dict[int, Line] = {}
        self._under_way: list[tuple[Build, Future[None]]] = []
        self._done: deque[Build] = deque()
        self._remains: list[Generation] = []
        self._dead: deque[list[Generation]] = deque()
        self._is_closed = False
        self._num_done = self._num_put_off = 0
        self._build_seconds = 0.0

    def search(self, slab: Slab, batch: SearchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Has generations nominate, scans the rest, ranks all."""
        with self._precedence.asking():
            self._adopt()
            views = self._views(batch)
            if not any(view.generations for view in views):
                return self._exact.search(slab, batch)
            found = self._in_lists(slab, batch, views) if self._lists else self._in_parts(slab, batch, views)
            return found or self._exact.search(slab, batch)

    def retrieve(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions, groups: NDArray[np.int64]) -> Hits:
        """Stage by stage where generations nominate; where none is seen, as the exact index does it."""
        with self._precedence.asking():
            self._adopt()
            views = self._views(batch)
            if not any(view.generations for view in views):
                return self._exact.retrieve(slab, batch, options, groups)
            if self._lists is None:
                return staged_retrieve(self, slab, batch, options, groups)
            hits = None
            if self._has_room(batch):
                ranges, is_building = self._ranges(views), bool(self._under_way)
                hits = self._lists.retrieve(slab, batch, ranges, options, groups, is_building=is_building)
            return hits or self._exact.retrieve(slab, batch, options, groups)

    def _in_parts(
        self, slab: Slab, batch: SearchBatch, views: Sequence[View]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """None where too few are found."""
        found = [self._nominator.nominated(batch, views, self._builder.candidates(batch.top_k))]
        for ranges in ([view.front for view in views], [view.back for view in views]):
            begins, ends = zip(*ranges, strict=True)
            if begins != ends:
                found.append(self._exact.search(slab, replace(batch, begins=begins, ends=ends))[0])
        positions, scores = rank(slab, batch, torch.cat(found, -1))
        positions, scores = positions[..., : batch.top_k], scores[..., : batch.top_k]
        return None if _are_too_few(batch, positions) else (positions, scores)

    def _in_lists(
        self, slab: Slab, batch: SearchBatch, views: Sequence[View]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """None where too few are found."""
        if self._lists is None or not self._has_room(batch):
            return None
        return self._lists.search(slab, batch, self._ranges(views))

    def _has_room(self, batch: SearchBatch) -> bool:
        """Whether kernels have room for as many hits, and as many lists as are asked for."""
        return batch.top_k <= MOST_HITS and not self._misses_lists

    def _ranges(self, views: Sequence[View]) -> Ranges:
        """Views as numbers."""
        from memstore.gpu.ranges import Ranges

        numbers = [
            (self._number(view.generations[0]), self._number(view.generations[-1]) + 1) if view.generations else (0, 0)
            for view in views
        ]
        scanned = np.array([(view.front, view.back) for view in views]).swapaxes(0, 1)
        return Ranges(np.array(numbers), tuple(scanned))

    def _line(self) -> Line:
        """Nothing yet."""
        return Line(keeps_dying=self._lists is not None and self._lists.keeps_dying)

    def _number(self, generation: Generation) -> int:
        """Which of the spans that positions are cut into it lies in."""
        return (generation.end - 1) // self._rows

    def steady(self, slab: Slab, batch: SearchBatch, options: RetrieveOptions) -> Steady | None:
        """Generations come and go."""
        return None

    def appended(self, slab: Slab, place: int, begin: int, end: int) -> None:
        """Drops what is dead, and begins to build what is full."""
        self._adopt()
        line = self._lines.setdefault(place, self._line())
        line.begin, line.end = begin, end
        self._bury(line.drop_dead())
        while not self._is_closed and end >= line.retry_at and (positions := line.next_range(self._rows)) is not None:
            after = line.builds[-1] if line.builds else None
            build = Build(self._builder, slab, place, positions, after, self._precedence)
            if not self._start(build):
                return
            line.builds.append(build)

    def forgotten(self, place: int) -> None:
        """Stops builds of the place, and drops its generations."""
        line = self._lines.pop(place, self._line())
        for build in line.builds:
            build.is_stopped = True
        self._bury(line.generations)

    def forked(self, slab: Slab, source: int, target: int, begin: int, end: int) -> None:
        """The target has the generations of the source that it sees to their end: they never change."""
        line = self._lines.get(source, self._line())
        shared = [generation for generation in line.generations if begin < generation.end <= end]
        line = self._lines[target] = self._line()
        line.generations = shared
        if self._lists is not None:
            for generation in shared:
                self._lists.copy(source, target, self._number(generation))
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
        self._under_way, self._done, self._remains, self._dead = [], deque(), [], deque()
        self._exact.close()
        if self._lists is not None:
            self._lists.free()

    def _views(self, batch: SearchBatch) -> list[View]:
        """What each sequence of a batch sees."""
        ranges = zip(batch.places, batch.begins, batch.ends, strict=True)
        return [
            self._lines.get(place, self._line()).view(begin, end, can_mask=self._builder.can_mask)
            for place, begin, end in ranges
        ]

    def _start(self, build: Build) -> bool:
        """Whether the build thread takes it; not where the server is stopping."""
        try:
            self._under_way.append((build, self._executor.submit(self._run, build)))
        except RuntimeError:
            return False
        return True

    def _run(self, build: Build) -> None:
        """In the build thread. What is dead goes first, so that there is never more than is reserved."""
        self._let_go()
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
            place, line = next(((at, line) for at, line in self._lines.items() if done in line.builds), (-1, None))
            if line is not None:
                line.builds.remove(done)
                if generation is not None and not (done.has_failed or done.is_stopped):
                    generation = self._kept(place, generation)
                    if generation is None:  # those that follow would leave a gap
                        for build in (done, *line.builds):
                            build.has_failed = True
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

    def _kept(self, place: int, generation: Generation) -> Generation | None:
        """What of a generation its line has: lists are put where they are searched. None where there is no room."""
        if self._lists is None:
            return generation
        try:
            self._lists.put(place, self._number(generation), generation.parts)
        except NO_ROOM as error:
            trouble(_log, "generation not kept", error, first=generation.first, end=generation.end)
            return None
        return replace(generation, parts=())

    def _bury(self, generations: list[Generation]) -> None:
        """Has the build thread let go of them: on a GPU that waits for all that is under way there."""
        if generations:
            self._dead.append(generations)
            with suppress(RuntimeError):  # the server is stopping
                self._executor.submit(self._let_go)

    def _let_go(self) -> None:
        """In the build thread."""
        while self._dead:
            self._dead.popleft().clear()


def _are_too_few(batch: SearchBatch, positions: torch.Tensor) -> bool:
    """Whether a query has fewer hits than it can have."""
    can_be_seen = np.subtract(batch.ends, batch.begins)[None]
    (possible,) = batch.per_query(can_be_seen.clip(0, batch.top_k))
    return bool(((positions >= 0).sum(-1) < possible).any())
