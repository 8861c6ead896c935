"""Generations: runs of positions whose rows have an index of their own, and what a retrieval sees of them.

    front | generation | generation | ... | back        front and back are scanned row by row
    begin                                   end

A generation never changes. The row of position p in it has the id p - first, whatever the slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from memstore.gpu.ranges import Ranges
    from memstore.index.building import Build
    from memstore.search import SearchBatch
    from memstore.slab import Slab
    from memstore.types import Hits, RetrieveOptions


class Part(Protocol):
    """The index of one layer of a generation; used by one thread at a time."""

    def search(self, queries: torch.Tensor, seen: tuple[int, int], scores: torch.Tensor, ids: torch.Tensor) -> None:
        """Fills in scores, larger is nearer, and ids of rows within `seen`, each once, -1 where fewer are found.

        queries: (n, dim) float32; scores: (n, num) float32; ids: (n, num) int64; all contiguous. How many are found is
        not promised, nor that they are the nearest. seen: the whole generation unless PartBuilder.can_mask.
        """
        ...


class RowSource(Protocol):
    """The rows of one layer of a generation, in float32, of length 1 where the metric is cosine; read while building.

    A row whose position has left the ring since may be another one, or torn: nobody is shown it. They are the positions
    [first, end) of a place of a layer of the slab, where they are as they are stored.
    """

    @property
    def slab(self) -> Slab: ...

    @property
    def layer(self) -> int: ...

    @property
    def place(self) -> int: ...

    @property
    def first(self) -> int: ...

    @property
    def end(self) -> int: ...

    def __len__(self) -> int: ...

    def sample(self, num: int) -> torch.Tensor:
        """(at most num, dim): some of them, spread evenly."""
        ...

    def chunks(self) -> Iterator[torch.Tensor]:
        """All of them in the order of positions, (n, dim) float32, at most CHUNK_ROWS at a time."""
        ...


class PartBuilder(Protocol):
    """Builds the index of rows, for one kind and device, in the build thread.

    can_mask: whether parts can be searched for some positions only. candidates: how many rows a part shall nominate
    for `top_k` that are wanted, as its own scores are not exact.
    """

    can_mask: bool

    def candidates(self, top_k: int) -> int: ...

    def build(self, rows: RowSource, check: Callable[[], None]) -> Any:
        """A Part, or what a PartRetriever takes over. Calls `check`, which may raise, between pieces of bounded length.

        Raises MemoryError, torch.OutOfMemoryError or RuntimeError where there is no room, and has then given all back.
        """
        ...


class PartRetriever(Protocol):
    """Keeps what was built of all generations of a memory on a GPU, and searches it at once. For one thread at a time.

    keeps_dying: see Line.
    """

    keeps_dying: bool

    def put(self, place: int, number: int, layers: Sequence[Any]) -> None:
        """Takes over what was built of every layer of a generation, perhaps on another stream."""

    def copy(self, source: int, target: int, number: int) -> None:
        """A place has a generation of another one."""

    def search(self, slab: Slab, batch: SearchBatch, ranges: Ranges) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See VectorIndex.search; None where a query would have fewer hits than there are rows to be seen."""

    def retrieve(
        self,
        slab: Slab,
        batch: SearchBatch,
        ranges: Ranges,
        options: RetrieveOptions,
        groups: NDArray[np.int64],
        *,
        is_building: bool = False,
    ) -> Hits | None:
        """See VectorIndex.retrieve; None as above. is_building: beside a build, when nothing shall take long."""

    def free(self) -> None:
        """Gives all of it back."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Positions [first, end) of one sequence, with what was built of each layer, unless a PartRetriever keeps it."""

    first: int
    end: int
    parts: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class View:
    """What a retrieval sees: some generations by their index, and two ranges of positions that are scanned."""

    generations: tuple[Generation, ...]
    front: tuple[int, int]
    back: tuple[int, int]


@dataclass(slots=True)
class Line:
    """The generations of one place, oldest first and without a gap, the builds that follow them, and what is live.

    retry_at: the end of the live range from which a build is tried again, after one that failed. keeps_dying: whether
    a generation that is cut at its beginning only is seen to its end.
    """

    keeps_dying: bool = False
    generations: list[Generation] = field(default_factory=list)
    builds: list[Build] = field(default_factory=list)
    begin: int = 0
    end: int = 0
    retry_at: int = 0

    @property
    def num_scanned(self) -> int:
        """Live rows that are in no generation."""
        seen = self.view(self.begin, self.end, can_mask=True)
        return sum(end - begin for begin, end in (seen.front, seen.back))

    def view(self, begin: int, end: int, *, can_mask: bool) -> View:
        """What of [begin, end) is found by which way: half a generation or less is scanned, unless it is kept."""

        def is_used(generation: Generation) -> bool:
            rows = generation.end - generation.first
            seen = min(end, generation.end) - max(begin, generation.first)
            is_kept = self.keeps_dying and seen > 0 and generation.end <= end
            return seen == rows or is_kept or (can_mask and 2 * seen > rows)

        used = tuple(generation for generation in self.generations if is_used(generation))
        if not used:
            return View((), (begin, begin), (begin, end))
        return View(used, (begin, max(begin, used[0].first)), (min(end, used[-1].end), end))

    def next_range(self, rows: int) -> tuple[int, int] | None:
        """The next positions to be built, at least half of `rows`, that no generation or build has; None for none."""
        last = self.builds[-1] if self.builds else self.generations[-1] if self.generations else None
        first = max(self.begin, 0 if last is None else last.end)
        end = first - first % rows + rows
        if 2 * (end - first) < rows:
            first, end = end, end + rows
        return (first, end) if end <= self.end else None

    def drop_dead(self) -> list[Generation]:
        """Takes out the generations of which nothing is live any more, and stops such builds."""
        for build in self.builds:
            build.is_stopped |= build.end <= self.begin
        dead = [generation for generation in self.generations if generation.end <= self.begin]
        self.generations = self.generations[len(dead) :]
        return dead
