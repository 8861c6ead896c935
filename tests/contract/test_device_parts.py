"""Large memories on a GPU: builds in their thread while the device's goes on, and what they leave behind."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from memstore.errors import MemstoreError
from memstore.index import list_parts
from memstore.memory import Memory
from memstore.types import IndexCounts, IndexKind, MemorySpec, RetrieveOptions, SequencePart, StepBatch
from tests.building import KINDS
from tests.contract.test_large_index import DIM, kin, spec_of
from tests.device_memory import device_bytes

pytestmark = pytest.mark.gpu
LEAST_RECALL = 0.9


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


class Text:
    """A memory and an exact one with the same rows."""

    def __init__(self, spec: MemorySpec, device: torch.device) -> None:
        exact = dataclasses.replace(spec, index=IndexKind.EXACT, index_settings=None)
        self.memory, self.exact = (
            Memory(each, device, new_epoch=itertools.count(1).__next__) for each in (spec, exact)
        )

    def append(self, num_rows: int) -> None:
        """New rows in both layers."""
        part = SequencePart(sequence="a", num_rows=num_rows)
        batch = StepBatch(parts=(part,), layers=(0, 1), keys=kin(2 * num_rows).view(2, num_rows, DIM), append=True)
        for memory in (self.memory, self.exact):
            memory.step([batch])

    def recall(self, name: str = "a") -> float:
        """Share of the true 16 best of 20 queries that is found."""
        batch = StepBatch(
            parts=(SequencePart(sequence=name, num_rows=20),),
            layers=(0, 1),
            keys=kin(40).view(2, 20, DIM),
            retrieve=RetrieveOptions(top_k=16),
        )
        found, best = (self._positions(memory, batch) for memory in (self.memory, self.exact))
        return (found[..., None] == best[..., None, :]).any(-1).float().mean().item()

    @staticmethod
    def _positions(memory: Memory, batch: StepBatch) -> torch.Tensor:
        (result,) = memory.step([batch])
        assert not isinstance(result, MemstoreError)
        assert result.hits is not None
        return result.hits.positions[result.hits.index[..., 0].long()]

    @property
    def counts(self) -> IndexCounts:
        """Of the index."""
        counts = self.memory.counts().index
        assert counts is not None
        return counts


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_steps_go_on_while_generations_are_built(kind: IndexKind, gpu: torch.device) -> None:
    text = Text(dataclasses.replace(spec_of(kind), max_sequences=2), gpu)
    for _ in range(12):
        text.append(1000)
        assert text.recall() >= LEAST_RECALL
    while text.counts.builds_under_way:
        assert text.recall() >= LEAST_RECALL
    assert (text.counts.builds_put_off, text.counts.num_generations) == (0, 4)
    for memory in (text.memory, text.exact):
        memory.fork("a", "b", 9000, 0)
    assert text.counts.num_generations == 7
    assert text.recall("b") >= LEAST_RECALL
    assert text.memory.reset(["a"], True) == text.exact.reset(["a"], True)
    assert text.recall("b") >= LEAST_RECALL
    text.memory.free()
    text.memory.join()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_a_dropped_memory_gives_back_what_generations_took(kind: IndexKind, gpu: torch.device) -> None:
    held = []
    for _ in range(3):
        text = Text(spec_of(kind), gpu)
        text.append(8192)
        while text.counts.builds_under_way:
            text.recall()
        text.memory.free()
        text.memory.join()
        text.exact.free()
        held.append(device_bytes())
    assert held[2] <= held[1] + (32 << 20)  # the first one loaded kernels


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_no_memory_for_a_build_leaves_the_rows_in_the_tail(
    kind: IndexKind, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("memstore.gpu.linking.nearest_rows", no_room)
    monkeypatch.setattr(list_parts, "centres", no_room)
    text = Text(spec_of(kind), gpu)
    text.append(8192)
    while text.counts.builds_under_way:
        pass
    assert text.recall() == 1.0
    assert (text.counts.builds_put_off, text.counts.num_generations) == (4, 0)
