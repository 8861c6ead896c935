"""Memories with generations in a test: small ones that miss nothing, whose builds run when the test says so."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import torch

from memstore.errors import MemstoreError
from memstore.memory import Memory
from memstore.types import (
    IndexCounts,
    IndexKind,
    IndexSettings,
    MemorySpec,
    RetrieveOptions,
    SequencePart,
    StepBatch,
    StepResult,
)
from tests.comparing import assert_same
from tests.fakes import HeldBuilds
from tests.reference import ReferenceMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = (IndexKind.FAISS_IVF_FLAT, IndexKind.FAISS_IVF_PQ, IndexKind.FAISS_CAGRA)
ROWS = 32
"""Positions of a generation."""
SETTINGS = {
    IndexKind.FAISS_IVF_FLAT: IndexSettings(generation_rows=ROWS, nlist=4, nprobe=4),
    IndexKind.FAISS_IVF_PQ: IndexSettings(generation_rows=ROWS, nlist=2, nprobe=2, pq_m=4, pq_bits=4),
    IndexKind.FAISS_CAGRA: IndexSettings(generation_rows=ROWS, graph_degree=32, itopk=64),
}
"""So that a search of a generation nominates all of its rows, or the best of them."""
SPEC = MemorySpec(name="m", dim=8, capacity=100, max_sequences=3, num_layers=2)


def spec_of(kind: IndexKind, **changes: object) -> MemorySpec:
    """A spec with generations of 32 rows."""
    spec = dataclasses.replace(SPEC, index=kind, index_settings=SETTINGS[kind])
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


class Pair:
    """A memory with generations and the oracle. Whatever is asked, both must answer the same."""

    def __init__(self, spec: MemorySpec, device: torch.device) -> None:
        self.spec = spec
        self.builds = HeldBuilds()
        self.memory = Memory(spec, device, new_epoch=itertools.count(1).__next__, builds=self.builds)
        self.reference = ReferenceMemory(spec)

    @property
    def counts(self) -> IndexCounts:
        """Of the index."""
        counts = self.memory.counts().index
        assert counts is not None
        return counts

    def append(self, sequence: str, num_rows: int, *, start: bool = False) -> None:
        """Retrieves for new random rows, and appends them."""
        self.step(SequencePart(sequence=sequence, num_rows=num_rows, start_of_sequence=start), append=True)

    def look(self, *sequences: str, as_of: int | None = None, top_k: int = 4) -> StepResult:
        """Retrieves only, three queries for each."""
        parts = [SequencePart(sequence=name, num_rows=3, as_of=as_of) for name in sequences]
        return self.step(*parts, append=False, top_k=top_k)

    def step(self, *parts: SequencePart, append: bool, top_k: int = 4) -> StepResult:
        """A step of random rows on both."""
        num_rows = sum(part.num_rows for part in parts)
        batch = StepBatch(
            parts=parts,
            layers=tuple(range(self.spec.num_layers)),
            keys=torch.randn(self.spec.num_layers, num_rows, self.spec.dim),
            retrieve=RetrieveOptions(top_k=top_k, window_before=1),
            append=append,
        )
        (got,) = self.memory.step([batch])
        assert not isinstance(got, MemstoreError)
        assert_same(self.reference, batch, got, self.reference.step(batch))
        return got

    def reset(self, names: Sequence[str], release: bool = False) -> None:
        """On both."""
        assert self.memory.reset(names, release) == self.reference.reset(names, release)

    def fork(self, source: str, target: str, as_of: int | None = None) -> None:
        """On both."""
        assert self.memory.fork(source, target, as_of, 0) == self.reference.fork(source, target, as_of, 0)
