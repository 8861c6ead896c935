"""Pair: a memory and its oracle; the same steps must have the same answers."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from memstore.errors import MemstoreError
from memstore.memory import Memory
from memstore.types import KEY, MemorySpec, PayloadSpec, RetrieveOptions, SequencePart, StepBatch, StepResult
from tests.comparing import assert_same
from tests.reference import ReferenceMemory

CPU = torch.device("cpu")
DIM = 8
SPEC = MemorySpec(
    name="m",
    dim=DIM,
    capacity=10,
    max_sequences=4,
    num_layers=2,
    payloads=(
        PayloadSpec(name="hidden", dtype=torch.bfloat16, shape=(3, 2)),
        PayloadSpec(name="token", dtype=torch.int64, shape=(1,)),
    ),
)
EVERYTHING = RetrieveOptions(top_k=4, window_before=2, window_after=1, arrays=(KEY, "hidden", "token"))


class Pair:
    """A memory and its oracle; every step is made on both and compared."""

    def __init__(self, device: torch.device, spec: MemorySpec = SPEC) -> None:
        self.spec = spec
        self.memory = Memory(spec, device, new_epoch=itertools.count(1).__next__)
        self.reference = ReferenceMemory(spec)

    def batch(
        self,
        *parts: SequencePart,
        append: bool = True,
        retrieve: RetrieveOptions | None = EVERYTHING,
        writer: str = "",
        fingerprints: tuple[int, ...] = (),
        layers: tuple[int, ...] | None = None,
    ) -> StepBatch:
        """A batch of random rows."""
        layers = tuple(range(self.spec.num_layers)) if layers is None else layers
        rows = sum(part.num_rows for part in parts)
        payloads = {
            payload.name: (torch.randn(len(layers), rows, *payload.shape) * 100).to(payload.dtype)
            for payload in self.spec.payloads
        }
        return StepBatch(
            parts=parts,
            layers=layers,
            keys=torch.randn(len(layers), rows, self.spec.dim),
            payloads=payloads if append else {},
            retrieve=retrieve,
            append=append,
            writer=writer,
            fingerprints=fingerprints,
        )

    def step(self, batch: StepBatch) -> StepResult:
        """Both make the step; raises what both raise."""
        (got,) = self.memory.step([batch])
        if isinstance(got, MemstoreError):
            with pytest.raises(type(got)):
                self.reference.step(batch)
            self.compare_counts()
            raise got
        try:
            want = self.reference.step(batch)
        except MemstoreError as error:  # which a test that expects it must not take for the memory's
            raise AssertionError("the memory has done what the oracle refuses") from error
        assert_same(self.reference, batch, got, want)
        self.compare_counts()
        return got

    def append(self, *parts: SequencePart, writer: str = "", fingerprints: tuple[int, ...] = ()) -> StepResult:
        """A step of new random rows."""
        return self.step(self.batch(*parts, writer=writer, fingerprints=fingerprints))

    def look(self, *sequences: str, as_of: int | None = None) -> StepResult:
        """Retrieves only, three queries for each."""
        parts = [SequencePart(sequence=name, num_rows=3, as_of=as_of) for name in sequences]
        return self.step(self.batch(*parts, append=False))

    def compare_counts(self) -> None:
        """The counters agree."""
        got, want = self.memory.counts(), self.reference.counts()
        assert (got.num_sequences, got.num_rows) == (want.num_sequences, want.num_rows)
        assert (got.appended_rows, got.evicted_rows) == (want.appended_rows, want.evicted_rows)


def part(sequence: str, num_rows: int, *, seq: int = 0, epoch: int = 0, start: bool = False) -> SequencePart:
    """One sequence's part of a batch."""
    return SequencePart(sequence=sequence, num_rows=num_rows, seq=seq, epoch=epoch, start_of_sequence=start)


def replace(spec: MemorySpec, **changes: object) -> MemorySpec:
    """The spec with some of its fields changed."""
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]
