"""The contract of VectorIndex, over every index, device, metric and dtype, against float64."""

from __future__ import annotations

import dataclasses
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from memstore import ring
from memstore.index import INDEXES, exact, grid, product_scan, ranking, tiles
from memstore.index.crew import Crew
from memstore.search import SearchBatch
from memstore.slab import Slab
from memstore.types import IndexKind, MemorySpec, Metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memstore.index.base import VectorIndex

UNIT = 2.0**-23
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPEC = MemorySpec(name="m", dim=24, capacity=700, max_sequences=5, num_layers=2)


@pytest.fixture(params=list(INDEXES), ids=lambda kind: kind.value)
def index(request: pytest.FixtureRequest) -> VectorIndex:
    if request.param is IndexKind.FAISS_FLAT:
        pytest.importorskip("faiss")
    return INDEXES[request.param]()


def filled(device: torch.device, rows: torch.Tensor | None = None, **changes: object) -> Slab:
    """A slab whose every place is written; rows: (layers, places * capacity, dim)."""
    spec = dataclasses.replace(SPEC, **changes)  # type: ignore[arg-type]
    slab = Slab(spec, device)
    num_cells = spec.max_sequences * spec.capacity
    keys = torch.randn(spec.num_layers, num_cells, spec.dim) if rows is None else rows
    slab.write(slab.stage(keys.to(device), {}), slab.in_all_layers(torch.arange(num_cells, device=device)))
    return slab


def asked(
    slab: Slab,
    counts: Sequence[int],
    seen: Sequence[tuple[int, int]],
    *,
    top_k: int = 16,
    places: Sequence[int] | None = None,
    layers: Sequence[int] = (0, 1),
    dtype: torch.dtype = torch.float32,
) -> SearchBatch:
    return SearchBatch(
        queries=torch.randn(len(layers), sum(counts), slab.dim).to(slab.device, dtype),
        layers=tuple(layers),
        places=tuple(range(len(counts)) if places is None else places),
        counts=tuple(counts),
        begins=tuple(begin for begin, _ in seen),
        ends=tuple(end for _, end in seen),
        top_k=top_k,
    )


def true_scores(metric: Metric, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(n, dim), (m, dim) -> (n, m) float64."""
    queries, rows = queries.double(), rows.double()
    if metric is Metric.L2:
        return -(queries[:, None] - rows).square().sum(-1)
    products = queries @ rows.T
    if metric is Metric.COSINE:
        lengths = queries.norm(dim=-1)[:, None] * rows.norm(dim=-1)
        return torch.where(lengths > 0, products / lengths, 0.0)
    return products


def check(slab: Slab, batch: SearchBatch, index: VectorIndex) -> None:
    """Every promise of VectorIndex.search, query by query."""
    positions, scores = index.search(slab, batch)
    assert positions.shape == scores.shape == (*batch.queries.shape[:2], batch.top_k)
    assert (positions.dtype, scores.dtype) == (torch.int64, torch.float32)
    first = 0
    for sequence, count in enumerate(batch.counts):
        columns = slice(first, first + count)
        first += count
        begin, end = batch.begins[sequence], batch.ends[sequence]
        live = torch.arange(begin, max(begin, end))
        slots = ring.slot_of(live, slab.capacity).to(slab.device)
        for at, layer in enumerate(batch.layers):
            rows = slab.keys[layer, batch.places[sequence], slots].cpu()
            queries = batch.queries[at, columns].cpu()
            found, given = positions[at, columns].cpu(), scores[at, columns].cpu()
            check_sequence(slab.metric, queries, rows, found - begin, given)
            assert (found[found >= 0] >= begin).all()


def check_sequence(
    metric: Metric, queries: torch.Tensor, rows: torch.Tensor, found: torch.Tensor, given: torch.Tensor
) -> None:
    """found: (n, k) row numbers, below 0 for none; given: (n, k) scores."""
    num_hits = min(found.shape[1], len(rows))
    assert (found[:, :num_hits] >= 0).all()
    assert (found[:, num_hits:] < 0).all()
    assert torch.isneginf(given[:, num_hits:]).all()
    found, given = found[:, :num_hits], given[:, :num_hits]
    if not found.numel():
        return
    assert found.max() < len(rows)
    assert all(len(set(hits)) == num_hits for hits in found.tolist())
    truth = true_scores(metric, queries, rows)
    near = score_rounding(metric, queries, rows)
    assert ((given.double() - truth.gather(1, found)).abs() <= near.gather(1, found)).all()
    best = truth.topk(num_hits).values
    slack = selection_rounding(metric, queries, rows)
    assert (truth.gather(1, found) >= best[:, -1:] - slack).all()
    assert (given[:, :-1] >= given[:, 1:]).all()
    is_tie = given[:, :-1] == given[:, 1:]
    assert (found[:, :-1] < found[:, 1:])[is_tie].all()


def score_rounding(metric: Metric, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(n, m): how far a float32 score may be from the true one: a rounding of each term and each sum of them."""
    queries, rows = queries.double(), rows.double()
    if metric is Metric.L2:
        return (queries[:, None] - rows).square().sum(-1) * (queries.shape[1] + 1) * UNIT + 1e-37
    sizes = queries.abs() @ rows.abs().T
    if metric is Metric.COSINE:
        lengths = queries.norm(dim=-1)[:, None] * rows.norm(dim=-1)
        sizes = torch.where(lengths > 0, sizes / lengths, 0.0) + 1
    return sizes * queries.shape[1] * UNIT + 1e-37


def selection_rounding(metric: Metric, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(n, 1): how much worse than the true k-th a row may be that was taken: candidates are ranked before scoring."""
    longest = rows.double().norm(dim=-1).max()
    lengths = queries.double().norm(dim=-1, keepdim=True)
    if metric is Metric.COSINE:
        return torch.full_like(lengths, 4 * queries.shape[1] * UNIT)
    sizes = (lengths + longest).square() if metric is Metric.L2 else lengths * longest
    return sizes * 4 * queries.shape[1] * UNIT + 1e-37


FULL = (0, 700)
WRAPPED = (1000, 1700)


@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("asked_in", DTYPES, ids=str)
def test_every_metric_and_precision(
    index: VectorIndex, device: torch.device, metric: Metric, dtype: torch.dtype, asked_in: torch.dtype
) -> None:
    slab = filled(device, metric=metric, dtype=dtype)
    check(slab, asked(slab, (1, 2, 9), (FULL, WRAPPED, (3, 650)), dtype=asked_in), index)


@pytest.mark.parametrize("seen", [FULL, WRAPPED, (0, 1), (699, 701), (0, 0), (1000, 1003), (1399, 1401), (20, 680)])
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("top_k", [1, 16, 900])
def test_every_range(index: VectorIndex, device: torch.device, seen: tuple[int, int], count: int, top_k: int) -> None:
    slab = filled(device)
    check(slab, asked(slab, (count, count), (seen, seen), top_k=top_k, places=(3, 1)), index)


@pytest.mark.parametrize("counts", [(0, 0), (0, 7, 0, 1), (1, 1, 1, 1, 1), (30, 1, 0, 2, 30), (6, 6, 6)])
def test_ragged_batches(index: VectorIndex, device: torch.device, counts: tuple[int, ...]) -> None:
    slab = filled(device)
    seen = [FULL, WRAPPED, (0, 0), (0, 5), (10, 100)][: len(counts)]
    for places in (range(len(counts)), [4, 2, 3, 0, 1][: len(counts)]):
        check(slab, asked(slab, counts, seen, places=list(places)), index)
    check(slab, asked(slab, counts, seen, layers=(1,)), index)


def test_equal_rows_are_all_found_lower_positions_first(index: VectorIndex, device: torch.device) -> None:
    for metric in Metric:
        slab = filled(device, torch.ones(1, 5 * 700, 24), num_layers=1, metric=metric)
        for count in (1, 8):
            check(slab, asked(slab, (count,), (WRAPPED,), layers=(0,)), index)
            whole = asked(slab, (count,), ((1000, 1005),), layers=(0,))
            assert index.search(slab, whole)[0][0, 0, :5].tolist() == [1000, 1001, 1002, 1003, 1004]


@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
@pytest.mark.parametrize("size", [0.0, 1e-7, 6e-5, 1e4, 65504.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_tiny_and_huge_rows(
    index: VectorIndex, device: torch.device, metric: Metric, size: float, dtype: torch.dtype
) -> None:
    rows = torch.randn(2, 5 * 700, 24)
    rows[:, ::3] *= size
    rows[:, 1::3] = rows[:, 1::3].sign() * size
    rows[:, 2] = 0
    slab = filled(device, rows, metric=metric, dtype=dtype)
    batch = asked(slab, (1, 6), (FULL, WRAPPED))
    batch.queries[:, 2] *= size
    batch.queries[:, 3] = 0
    check(slab, batch, index)


def test_a_value_beyond_float16_is_kept_as_its_largest(device: torch.device) -> None:
    slab = filled(device, torch.full((2, 5 * 700, 24), -1e6))
    assert (slab.keys == -65504).all()
    assert torch.isfinite(slab.norms).all() if slab.norms is not None else False


def test_scratch_is_bounded_by_working_in_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_scan, "SCRATCH_BYTES", {"cpu": 20_000, "cuda": 400_000})
    monkeypatch.setattr(product_scan, "HOST_BLOCK", 64)
    slab = filled(device)
    check(slab, asked(slab, (30, 30, 30), (FULL, WRAPPED, (5, 90))), INDEXES[IndexKind.EXACT]())


def test_without_numba_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for metric in Metric:
        slab = filled(torch.device("cpu"), metric=metric)
        batch = asked(slab, (1, 2, 12), (WRAPPED, FULL, (2, 80)))
        compiled = INDEXES[IndexKind.EXACT]().search(slab, batch)
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "numba", None)
            for name in [name for name in sys.modules if name.startswith("memstore.host")]:
                without.delitem(sys.modules, name)
            ranking._compiled.cache_clear()
            exact.prepare(slab.device)
            index = INDEXES[IndexKind.EXACT]()
            check(slab, batch, index)
            found = index.search(slab, batch)
            ranking._compiled.cache_clear()
        assert torch.equal(compiled[0], found[0])
        torch.testing.assert_close(compiled[1], found[1], rtol=24 * UNIT, atol=24 * UNIT)


def test_both_indexes_give_the_same(device: torch.device) -> None:
    pytest.importorskip("faiss")
    for metric in Metric:
        slab = filled(device, metric=metric)
        batch = asked(slab, (1, 40, 3), (WRAPPED, FULL, (2, 80)))
        scanned, flat = (INDEXES[kind]().search(slab, batch) for kind in INDEXES)
        assert torch.equal(scanned[0], flat[0])
        # on the host all indexes rank by the same code; on a GPU sums are in another order
        tolerance = 0.0 if device.type == "cpu" else 1e-5
        torch.testing.assert_close(scanned[1], flat[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_slots", [1, 31, 32, 129, 1000, 4096])
@pytest.mark.parametrize("top_k", [1, 3, 16])
def test_the_best_of_tiles_are_the_best_of_all(device: torch.device, num_slots: int, top_k: int) -> None:
    scores = torch.randn(2, num_slots, 5).round(decimals=1).to(device)
    values, slots = tiles.best_slots(scores, top_k)
    want = scores.mT.topk(min(top_k, num_slots)).values
    assert torch.equal(values.sort(-1, descending=True).values, want)
    assert torch.equal(scores.mT.gather(2, slots), values)
    assert all(len(set(row)) == len(row) for row in slots.flatten(0, 1).tolist())


@pytest.mark.parametrize("counts", [(2, 2, 2), (1, 3, 2), (1, 0, 1)])
@pytest.mark.parametrize("places", [(0, 1, 2), (4, 1, 2), (2, 0, 1)])
def test_a_grid_puts_every_query_beside_its_place_and_back(
    counts: tuple[int, ...], places: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    slab = filled(torch.device("cpu"))
    batch = asked(slab, counts, (FULL, WRAPPED, (2, 80)), places=places, layers=(0,))
    monkeypatch.setattr(slab, "device", torch.device("cuda"))
    seen = torch.zeros(sum(counts), dtype=torch.int64)
    for each in grid.grids(slab, batch):
        laid = each.spread(batch.queries[0])
        assert torch.equal(each.collect(laid), batch.queries[0, each.columns])
        number = torch.arange(len(each.begins)) + each.first_place
        seen[each.columns] = each.collect(number[:, None, None].expand(-1, each.num_queries, 1))[:, 0]
    assert torch.equal(seen, torch.tensor(places).repeat_interleave(torch.tensor(counts)))


@pytest.mark.parametrize("keys", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked_in", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_queries_in_parts_are_as_precise_as_float32(keys: torch.dtype, asked_in: torch.dtype, size: float) -> None:
    query = (torch.randn(3, 1, 24) * size).clamp(-65504, 65504).to(asked_in)
    parts, exponents = product_scan.in_parts(query, keys)
    assert parts.dtype == keys
    whole = torch.ldexp(parts.double().view(3, -1, 24).sum(1), exponents[:, 0].double())
    want = query[:, 0].double()
    assert ((whole - want).abs() <= want.abs().amax() * UNIT).all()


def test_a_helper_that_is_held_up_is_not_waited_for() -> None:
    is_held, may_go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def work(pieces: Iterable[int]) -> None:
        for piece in pieces:
            if threading.current_thread() is not threading.main_thread():
                is_held.set()
                may_go_on.wait()
            else:
                is_held.wait()
            done.append(piece)

    Crew().do(work, range(5), num_threads=2, patience_s=0.0)
    assert sorted(done) == [0, 1, 2, 3, 4]
    may_go_on.set()


def test_a_crew_raises_what_its_helpers_raise() -> None:
    has_failed = threading.Event()

    def work(pieces: Iterable[int]) -> None:
        for piece in pieces:
            if threading.current_thread() is threading.main_thread():
                has_failed.wait()
            if piece == 3:
                has_failed.set()
                raise ValueError("piece 3 cannot be done")

    with pytest.raises(ValueError, match="piece 3 cannot be done"):
        Crew().do(work, range(5), num_threads=2, patience_s=1.0)
