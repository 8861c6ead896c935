"""Repeated: one retrieval of a memory that is asked again and again, each time of the state that there is then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memstore.retrieval import search_batch
from memstore.sequence import BatchPlan, plan_part

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.index.base import Steady, VectorIndex
    from memstore.search import SearchBatch
    from memstore.sequence import SequenceTable
    from memstore.slab import Slab
    from memstore.types import RetrieveOptions, StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What of a memory is read. check_lives: raises NotFound once it is freed."""

    slab: Slab
    table: SequenceTable
    index: VectorIndex
    check_lives: Callable[[], None]


class Repeated:
    """See above. `steady` has its tensors. Called by whoever has the device to itself, but for `launch`."""

    def __init__(self, source: Source, batch: StepBatch, options: RetrieveOptions, steady: Steady) -> None:
        self.steady = steady
        self._source = source
        self._batch = batch
        self._options = options

    @classmethod
    def of(cls, source: Source, batch: StepBatch) -> Repeated | None:
        """For batches like this one, which retrieves and does nothing else; None where the index cannot.

        Raises torch.OutOfMemoryError, and what makes a retrieval for this batch impossible.
        """
        options = batch.retrieve
        if options is None or batch.append or any(part.start_of_sequence for part in batch.parts):
            return None
        steady = source.index.steady(source.slab, _planned(source, batch, options), options)
        return None if steady is None else cls(source, batch, options, steady)

    def follow(self) -> bool:
        """Takes over how far the sequences are written now; False where that needs more room than there is.

        On a GPU by the current stream. Raises MemstoreError where the memory is gone, or can retrieve nothing.
        """
        self._source.check_lives()
        planned = _planned(self._source, self._batch, self._options)
        if not self.steady.fits(self._source.slab, planned):
            return False
        self.steady.point(self._source.slab, planned)
        return True

    def launch(self) -> None:
        """See Steady.launch."""
        self.steady.launch(self._source.slab)


def _planned(source: Source, batch: StepBatch, options: RetrieveOptions) -> SearchBatch:
    capacity, table = source.slab.capacity, source.table
    parts = tuple(
        plan_part(part, table.get(part.sequence), capacity, writer=None, fingerprint=0) for part in batch.parts
    )
    return search_batch([BatchPlan(batch=batch, parts=parts)], options.top_k)
