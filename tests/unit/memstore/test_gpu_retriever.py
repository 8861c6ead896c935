"""Retrieval on a GPU against the same in stages: windows, distinct rows, pieces, graphs. Search: tests/contract."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from memstore.index.exact import ExactIndex
from memstore.index.staged import staged_retrieve
from memstore.search import SearchBatch
from memstore.slab import Slab
from memstore.types import KEY, FirstPass, Hits, MemorySpec, Metric, PayloadSpec, RetrieveOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PAYLOAD = PayloadSpec(name="value", dtype=torch.bfloat16, shape=(3, 5))
SPEC = MemorySpec(name="m", dim=40, capacity=1500, max_sequences=6, num_layers=2, payloads=(PAYLOAD,))
RANGES = [(0, 1500), (2000, 3500), (1490, 1530), (0, 0), (700, 720), (4000, 5000)]


def filled(**changes: object) -> Slab:
    spec = dataclasses.replace(SPEC, **changes)  # type: ignore[arg-type]
    slab = Slab(spec, torch.device("cuda"))
    cells = torch.arange(spec.max_sequences * spec.capacity, device="cuda")
    keys = torch.randn(spec.num_layers, len(cells), spec.dim, device="cuda")
    payloads = {PAYLOAD.name: torch.randn(spec.num_layers, len(cells), 3, 5, device="cuda")}
    slab.write(slab.stage(keys, payloads), slab.in_all_layers(cells))
    return slab


def asked(slab: Slab, counts: Sequence[int], *, top_k: int = 16, dtype: torch.dtype = torch.float16) -> SearchBatch:
    seen = RANGES[: len(counts)]
    return SearchBatch(
        queries=torch.randn(2, sum(counts), slab.dim, device="cuda").to(dtype),
        layers=(1, 0),
        places=(5, 0, 3, 1, 4, 2)[: len(counts)],
        counts=tuple(counts),
        begins=tuple(begin for begin, _ in seen),
        ends=tuple(end for _, end in seen),
        top_k=top_k,
    )


def check(slab: Slab, batch: SearchBatch, options: RetrieveOptions, index: ExactIndex) -> Hits:
    """The same as in stages: rows, windows, order; groups in an order of their own."""
    num_groups = len(batch.layers) * len(batch.places)
    groups = np.random.default_rng(0).permutation(num_groups).reshape(len(batch.layers), -1)
    got = index.retrieve(slab, batch, options, groups)
    want = staged_retrieve(index, slab, batch, options, groups)
    for name in ("row_splits", "positions", "index"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert (got.scores is None) == options.omit_scores
    assert got.scores is None or torch.equal(got.scores, want.scores)
    assert got.arrays.keys() == want.arrays.keys()
    assert all(torch.equal(got.arrays[name], want.arrays[name]) for name in got.arrays)
    return got


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 3), (5, 0, 40, 2, 1, 300), (0, 0), (0, 1), (200, 1), (70, 20)])
@pytest.mark.parametrize("window", [(0, 0), (0, 1), (2, 3), (64, 64)])
def test_windows_and_distinct_rows(counts: tuple[int, ...], window: tuple[int, int]) -> None:
    slab = filled()
    options = RetrieveOptions(top_k=16, window_before=window[0], window_after=window[1], arrays=(KEY, "value"))
    check(slab, asked(slab, counts), options, ExactIndex())


@pytest.mark.parametrize("top_k", [1, 2, 3, 31, 64, 100, 128])
@pytest.mark.parametrize("counts", [(1, 1, 1), (20, 3)])
def test_every_number_of_hits(top_k: int, counts: tuple[int, ...]) -> None:
    slab = filled()
    options = RetrieveOptions(top_k=top_k, window_after=1, omit_scores=top_k == 3)
    check(slab, asked(slab, counts, top_k=top_k), options, ExactIndex())


@pytest.mark.parametrize("first_pass", [FirstPass.ROWS, FirstPass.INT4], ids=lambda kind: kind.value)
@pytest.mark.parametrize("arrays", [(), (KEY,), ("value", KEY)])
@pytest.mark.parametrize("num_sequences", [1, 2, 64, 65])
def test_one_query_of_each_of_few_rings_or_more(
    num_sequences: int, arrays: tuple[str, ...], first_pass: FirstPass
) -> None:
    """Up to 128 rings one kernel makes the reply, whose programs tell one another where they begin, step after step."""
    slab, index = filled(max_sequences=num_sequences, capacity=90, first_pass=first_pass), ExactIndex()
    options = RetrieveOptions(top_k=16, window_before=1, window_after=1, arrays=arrays)
    for number in range(20):
        ends = np.random.default_rng(number).integers(0, 500, num_sequences)
        batch = dataclasses.replace(
            asked(slab, ()),
            queries=torch.randn(2, num_sequences, slab.dim, device="cuda").half(),
            places=tuple(range(num_sequences)),
            counts=(1,) * num_sequences,
            begins=tuple(np.maximum(ends - 90, 0).tolist()),
            ends=tuple(ends.tolist()),
        )
        check(slab, batch, options, index)


@pytest.mark.parametrize("dim", [1, 16, 64, 100, 256, 300, 1024, 4096])
@pytest.mark.parametrize("counts", [(1, 1), (17, 150)])
def test_every_width(dim: int, counts: tuple[int, ...]) -> None:
    slab = filled(dim=dim, capacity=700)
    batch = dataclasses.replace(asked(slab, counts), begins=(0, 1000), ends=(700, 1700))
    check(slab, batch, RetrieveOptions(top_k=16, window_after=1), ExactIndex())


def test_a_step_after_another_with_rings_of_another_length() -> None:
    """One graph serves batches whose sequences, ranges and layers differ."""
    slab, index = filled(), ExactIndex()
    options = RetrieveOptions(top_k=16, window_before=1, window_after=1)
    for end in (1, 400, 900, 1499, 1500, 1501, 20_000):
        batch = asked(slab, (2, 2, 2))
        batch = dataclasses.replace(batch, begins=(max(end - 1500, 0), 0, 3), ends=(end, 5, 1003))
        check(slab, batch, options, index)
        swapped = dataclasses.replace(batch, layers=(0, 1), places=(1, 2, 4))
        check(slab, swapped, options, index)


def test_one_graph_serves_batches_of_different_numbers_of_sequences() -> None:
    from memstore.gpu.decode import DecodeGraphs

    slab, index = filled(), ExactIndex()
    for number in (4, 3, 4, 2, 3):
        batch = dataclasses.replace(
            asked(slab, (1,) * number), begins=(0, 5, 20, 0)[:number], ends=(9, 900, 21, 0)[:number]
        )
        check(slab, batch, RetrieveOptions(top_k=16, window_after=1), index)
    graphs = index._gpu._graphs if index._gpu is not None else DecodeGraphs()  # what is tested has no outer sign
    assert len(graphs) == 2


def test_a_reply_is_not_touched_by_the_next_step() -> None:
    slab, index = filled(), ExactIndex()
    options = RetrieveOptions(top_k=16, window_after=1)
    first = check(slab, asked(slab, (1, 1)), options, index)
    kept = [tensor.clone() for tensor in (first.positions, first.index, first.arrays[KEY])]
    check(slab, asked(slab, (1, 1)), options, index)
    for tensor, copy in zip((first.positions, first.index, first.arrays[KEY]), kept, strict=True):
        assert torch.equal(tensor, copy)


def test_more_kinds_of_steps_than_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from memstore.gpu import decode

    monkeypatch.setattr(decode, "MOST_GRAPHS", 2)
    slab, index = filled(), ExactIndex()
    for top_k in (1, 2, 3, 1, 2):
        check(slab, asked(slab, (1, 1), top_k=top_k), RetrieveOptions(top_k=top_k), index)


def test_scratch_is_bounded_by_working_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from memstore.gpu import launch

    slab, options = filled(), RetrieveOptions(top_k=16, window_after=1)
    batch = asked(slab, (300, 1, 40, 0, 130))
    groups = np.arange(10).reshape(2, 5)
    whole = ExactIndex().retrieve(slab, batch, options, groups)
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 100_000)
    in_pieces = ExactIndex().retrieve(slab, batch, options, groups)
    assert torch.equal(whole.index, in_pieces.index)
    assert torch.equal(whole.positions, in_pieces.positions)


def test_a_step_that_is_done_in_pieces_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is decided by reading a table back, which would spoil the capture, step after step."""
    from memstore.gpu import launch

    monkeypatch.setattr(launch, "SCRATCH_BYTES", 1000)
    slab, index, options = filled(), ExactIndex(), RetrieveOptions(top_k=16, window_after=1)
    check(slab, asked(slab, (2, 2)), options, index)
    assert index.steady(slab, asked(slab, (2, 2)), options) is None
    assert index._gpu is not None
    assert len(index._gpu._graphs) == 0  # which has no outer sign


def test_the_scratch_of_a_search_does_not_grow_with_capacity_times_queries() -> None:
    from memstore.gpu import launch

    slab = filled(capacity=65_536, num_layers=1, max_sequences=1, payloads=())
    queries = torch.randn(1, 20_000, slab.dim, device="cuda").half()
    batch = SearchBatch(
        queries=queries, layers=(0,), places=(0,), counts=(20_000,), begins=(0,), ends=(65_536,), top_k=16
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hits = ExactIndex().retrieve(slab, batch, RetrieveOptions(top_k=16), np.zeros((1, 1), np.int64))
    reply = 16 * 20_000 * (4 + 4 + 8 + 8 + 4) + hits.arrays[KEY].nbytes
    assert torch.cuda.max_memory_allocated() - before < launch.SCRATCH_BYTES * 1.25 + reply * 2


@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
def test_rows_whose_products_overflow_are_there_all_the_same(metric: Metric) -> None:
    slab = filled(metric=metric, dtype=torch.float32)
    slab.keys[:, :, ::2] = 3e38
    if slab.norms is not None:
        slab.norms[:, :, ::2] = torch.inf if metric is Metric.L2 else 0.0
    batch = dataclasses.replace(asked(slab, (1, 20), dtype=torch.float32), begins=(0, 1490), ends=(10, 1503))
    found, _ = ExactIndex().search(slab, batch)
    assert ((found >= 0).sum(-1)[:, 0] == 10).all()
    assert ((found >= 0).sum(-1)[:, 1:] == 13).all()


CODED = [FirstPass.INT8, FirstPass.INT4, FirstPass.INT2]


@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
@pytest.mark.parametrize("first_pass", CODED, ids=lambda kind: kind.value)
@pytest.mark.parametrize("dim", [48, 64, 128, 256, 512, 1040, 2048])
def test_what_codes_nominate_is_scored_by_its_row(metric: Metric, first_pass: FirstPass, dim: int) -> None:
    """So few rows that all are nominated: what is found is what is found without codes."""
    exact = filled(dim=dim, metric=metric)
    coded = filled(dim=dim, metric=metric, first_pass=first_pass)
    cells = torch.arange(exact.num_places * exact.capacity, device="cuda")
    coded.write(exact.rows(cells), coded.in_all_layers(cells))
    batch = asked(exact, (1, 4, 8))
    batch = dataclasses.replace(batch, begins=(1490, 0, 3), ends=(1506, 7, 3))
    options = RetrieveOptions(top_k=16, window_after=1)
    groups = np.arange(6).reshape(2, 3)
    want = ExactIndex().retrieve(exact, batch, options, groups)
    got = check(coded, batch, options, ExactIndex())
    found = ExactIndex().retrieve(coded, batch, options, groups)
    assert torch.equal(want.positions, found.positions)
    assert got.index.shape == want.index.shape


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 3), (5, 0, 8, 2, 1, 7), (9, 1), (1, 300)])
@pytest.mark.parametrize("first_pass", CODED, ids=lambda kind: kind.value)
def test_windows_of_what_codes_nominate(first_pass: FirstPass, counts: tuple[int, ...]) -> None:
    """By graphs or not, and for batches whose rows are read."""
    slab = filled(dim=64, first_pass=first_pass)
    options = RetrieveOptions(top_k=16, window_before=1, window_after=2, arrays=(KEY, "value"))
    check(slab, asked(slab, counts), options, ExactIndex())


@pytest.mark.parametrize("top_k", [1, 16, 17, 64, 128])
@pytest.mark.parametrize("first_pass", CODED, ids=lambda kind: kind.value)
def test_few_of_the_best_are_missed_by_codes(first_pass: FirstPass, top_k: int) -> None:
    rows = torch.randn(2, 40, 1, 64, device="cuda").repeat(1, 1, 225, 1).flatten(1, 2)
    rows += torch.randn(2, 9000, 64, device="cuda") * 0.5
    shape = {"dim": 64, "payloads": ()}
    exact, coded = filled(**shape), filled(**shape, first_pass=first_pass)
    cells = torch.arange(9000, device="cuda")
    for slab in (exact, coded):
        slab.write(slab.stage(rows, {}), slab.in_all_layers(cells))
    batch = asked(exact, (4, 4), top_k=top_k)
    batch = dataclasses.replace(batch, begins=(0, 700), ends=(1500, 2200))
    batch.queries.copy_(rows[:, ::1125] + 0.3 * torch.randn(2, 8, 64, device="cuda"))
    want, found = (ExactIndex().search(slab, batch)[0] for slab in (exact, coded))
    assert (want[..., None] == found[..., None, :]).any(-1).float().mean() >= 0.97


@pytest.mark.parametrize("dim", [40, 100])
def test_rows_are_read_where_codes_are_not_whole_words(dim: int) -> None:
    from memstore.gpu.coded import reads_codes

    slab = filled(dim=dim, first_pass=FirstPass.INT2)
    assert not reads_codes(slab, 16, 1)
    check(slab, asked(slab, (1, 1)), RetrieveOptions(top_k=16), ExactIndex())
