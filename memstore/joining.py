"""Group: steps of one memory that one search can serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from memstore.types import RetrieveOptions, StepBatch

MAX_JOINED_ROWS = 16_384
"""Rows of all layers that one joined search has at most, so that its working memory stays bounded."""
E = TypeVar("E")
J = TypeVar("J")


@dataclass(slots=True)
class Group(Generic[E, J]):
    """Steps that go to one engine together: their jobs, and what each asks for."""

    engine: E
    jobs: list[J] = field(default_factory=list)
    batches: list[StepBatch] = field(default_factory=list)
    sequences: set[str] = field(default_factory=set)
    search: tuple[RetrieveOptions, tuple[int, ...]] | None = None
    num_rows: int = 0

    def takes(self, batch: StepBatch) -> bool:
        """True where `batch` can be joined: disjoint sequences, one kind of search, bounded size."""
        if not self.batches:
            return True
        if self.num_rows + _rows(batch) > MAX_JOINED_ROWS:
            return False
        if batch.retrieve is not None and self.search not in (None, (batch.retrieve, batch.layers)):
            return False
        return self.sequences.isdisjoint(part.sequence for part in batch.parts)

    def add(self, job: J, batch: StepBatch) -> None:
        """Joins a step that is taken."""
        self.jobs.append(job)
        self.batches.append(batch)
        self.sequences.update(part.sequence for part in batch.parts)
        self.num_rows += _rows(batch)
        if batch.retrieve is not None:
            self.search = (batch.retrieve, batch.layers)


def _rows(batch: StepBatch) -> int:
    return batch.keys.shape[0] * batch.keys.shape[1]
