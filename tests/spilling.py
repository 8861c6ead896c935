"""Watched: a memory that spills, and what is to be seen of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memstore.errors import MemstoreError
from memstore.memory import Memory
from memstore.spill_file import SpillFolder
from memstore.types import Hits, MemorySpec, Metric, PayloadSpec, SpillCounts, SpillSpec, StepBatch, StepResult
from tests.fakes import FakeClock, FakeDisk
from tests.lives import batch, found

CPU = torch.device("cpu")
FOLDER = Path("/data/spilled/t/m")
SPEC = MemorySpec(name="m", dim=2, capacity=4, max_sequences=2, spill=SpillSpec(max_sequences=3, host_sequences=1))
RICH = replace(
    SPEC,
    num_layers=2,
    metric=Metric.COSINE,
    payloads=(PayloadSpec(name="hidden", dtype=torch.bfloat16, shape=(3,)),),
)


class Watched:
    """A memory that spills, its clock and its disk."""

    def __init__(self, spec: MemorySpec = SPEC, device: torch.device = CPU) -> None:
        self.clock = FakeClock()
        self.disk = FakeDisk()
        self.memory = Memory(spec, device, new_epoch=itertools.count(1).__next__)
        self.memory.lifecycle.clock = self.clock
        if self.memory.lifecycle.spill is not None:
            self.memory.lifecycle.spill.tiers.files.folder = SpillFolder(FOLDER, self.disk)

    @property
    def counts(self) -> SpillCounts:
        """Where sequences lie."""
        counts = self.memory.counts().spill
        assert counts is not None
        return counts

    @property
    def tiers(self) -> tuple[int, int, int]:
        """Sequences on the device, in host memory, in files."""
        counts = self.counts
        return counts.num_resident, counts.num_on_host, counts.num_on_disk

    def resident(self) -> str:
        """The names of sequences on the device."""
        return "".join(
            sorted(n for n, each in self.memory._table.items() if each.place < self.memory.spec.max_sequences)
        )

    def step(self, *batches: StepBatch) -> list[StepResult | MemstoreError]:
        """Several steps joined into one."""
        self.clock.advance(1)
        return self.memory.step(batches)

    def append(self, names: str, rows: int = 3, seq: int = 0, value: float = 0.0) -> None:
        """Appends to each of these sequences, one after another."""
        for name in names:
            (result,) = self.step(batch(self.memory.spec, name, rows, seq, value=value + ord(name)))
            if isinstance(result, MemstoreError):
                raise result


def plain(spec: MemorySpec) -> MemorySpec:
    """The same memory with a place for every sequence."""
    return replace(spec, max_sequences=spec.total_sequences, spill=SpillSpec())


def looked(memory: Memory, name: str) -> list[Any]:
    """All that a retrieval gives, to be compared."""
    result = found(memory, name)
    hits = result.hits
    assert isinstance(hits, Hits)
    assert hits.scores is not None
    arrays = {each: rows.cpu().view(torch.uint8).tolist() for each, rows in hits.arrays.items()}
    return [result.sequences, hits.positions.tolist(), hits.index.tolist(), hits.scores.cpu().tolist(), arrays]
