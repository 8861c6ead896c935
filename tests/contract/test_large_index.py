"""What generations promise of a search at a size where they miss rows, over every kind, metric and device."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import pytest
import torch

from memstore.index import INDEXES, make_index
from memstore.index.generations import GenerationIndex
from memstore.slab import Slab
from memstore.types import IndexKind, IndexSettings, MemorySpec, Metric
from tests.building import KINDS
from tests.contract.test_index import asked, check
from tests.fakes import HeldBuilds

if TYPE_CHECKING:
    from memstore.search import SearchBatch

pytest.importorskip("faiss")
DIM, ROWS, CAPACITY = 32, 2048, 8192
SEEN = ((0, CAPACITY), (1000, 1000 + CAPACITY), (0, 5000), (6000, 6100), (3, 2051))
LEAST_RECALL = 0.9


def kin(num: int) -> torch.Tensor:
    """(num, dim) rows around 200 centres, as states are, not everywhere alike."""
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(200, DIM, generator=generator)
    return centres[torch.randint(200, (num,))] + 0.4 * torch.randn(num, DIM)


def spec_of(kind: IndexKind, metric: Metric = Metric.L2, dtype: torch.dtype = torch.float16) -> MemorySpec:
    settings = {
        IndexKind.FAISS_IVF_FLAT: IndexSettings(generation_rows=ROWS, nlist=32, nprobe=16),
        IndexKind.FAISS_IVF_PQ: IndexSettings(generation_rows=ROWS, nlist=16, nprobe=8, pq_m=8, pq_bits=8),
        IndexKind.FAISS_CAGRA: IndexSettings(generation_rows=ROWS, graph_degree=32, itopk=64),
    }[kind]
    return MemorySpec(
        name="m",
        dim=DIM,
        capacity=CAPACITY,
        num_layers=2,
        dtype=dtype,
        metric=metric,
        index=kind,
        index_settings=settings,
    )


class Filled:
    """A full slab of one place, wrapped at position 1,000, and an index that has built all it can."""

    def __init__(self, spec: MemorySpec, device: torch.device) -> None:
        self.slab = Slab(spec, device)
        builds = HeldBuilds()
        self.index = make_index(spec, device, builds)
        assert isinstance(self.index, GenerationIndex)
        rows = kin(2 * CAPACITY).view(2, CAPACITY, DIM).to(device)
        self.slab.write(self.slab.stage(rows, {}), self.slab.in_all_layers(torch.arange(CAPACITY, device=device)))
        self.index.appended(self.slab, 0, 0, CAPACITY)
        builds.run()
        assert self.index.counts().num_generations == 4

    def batch(self, seen: tuple[int, int], count: int, top_k: int = 16) -> SearchBatch:
        """Queries like the rows, in both layers."""
        batch = asked(self.slab, (count,), (seen,), top_k=top_k)
        batch.queries[:] = kin(2 * count).view(2, count, DIM)
        return batch


@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_few_of_the_best_are_missed_and_scores_are_those_of_the_rows(
    kind: IndexKind, metric: Metric, device: torch.device
) -> None:
    filled = Filled(spec_of(kind, metric), device)
    for seen, count in itertools.product(SEEN, (8, 40)):
        batch = filled.batch(seen, count)
        positions, scores = filled.index.search(filled.slab, batch)
        best, best_scores = INDEXES[IndexKind.EXACT]().search(filled.slab, batch)
        assert (positions >= seen[0]).all()
        assert (positions < seen[1]).all()
        assert (scores[..., :-1] >= scores[..., 1:]).all()
        is_found = (positions[..., None] == best[..., None, :]).any(-1)
        assert is_found.float().mean() >= LEAST_RECALL, seen
        same = positions == best
        tolerance = 0.0 if device.type == "cpu" else 1e-5  # on a GPU sums are in another order
        torch.testing.assert_close(scores[same], best_scores[same], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("metric", [Metric.L2, Metric.INNER_PRODUCT], ids=lambda metric: metric.value)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_with_all_lists_probed_nothing_is_missed(metric: Metric, dtype: torch.dtype, device: torch.device) -> None:
    spec = spec_of(IndexKind.FAISS_IVF_FLAT, metric, dtype)
    settings = IndexSettings(generation_rows=ROWS, nlist=32, nprobe=32)
    filled = Filled(dataclasses.replace(spec, index_settings=settings), device)
    for seen in SEEN:
        check(filled.slab, filled.batch(seen, 9), filled.index)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_as_many_hits_are_given_as_there_are_rows(kind: IndexKind, device: torch.device) -> None:
    filled = Filled(spec_of(kind), device)
    positions, _ = filled.index.search(filled.slab, filled.batch((0, CAPACITY), 2, top_k=1000))
    assert (positions >= 0).all()
    positions, _ = filled.index.search(filled.slab, filled.batch((10, 700), 2, top_k=1000))
    assert ((positions >= 0).sum(-1) == 690).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_generations_are_searched_and_not_scanned(
    kind: IndexKind, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = Filled(spec_of(kind), device)
    monkeypatch.setattr(filled.index, "_exact", None)
    positions, _ = filled.index.search(filled.slab, filled.batch((0, CAPACITY), 3))
    assert (positions >= 0).all()
