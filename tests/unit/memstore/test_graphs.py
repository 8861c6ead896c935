"""Graphs of rows: which links they have, what of them is reserved, and walks that miss nothing where they meet all."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from memstore.index.graph_parts import GraphBuilder
from memstore.index.settings import MOST_MET, graph_shape, index_bytes
from memstore.index.stored_rows import StoredRows, random_rows
from memstore.search import SearchBatch
from memstore.slab import Slab
from memstore.types import IndexKind, IndexSettings, MemorySpec, Metric, RetrieveOptions

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ROWS, LINKS, DIM = 64, 8, 24
SPEC = MemorySpec(
    name="m",
    dim=DIM,
    capacity=250,
    max_sequences=2,
    num_layers=2,
    index=IndexKind.FAISS_CAGRA,
    index_settings=IndexSettings(generation_rows=ROWS, graph_degree=LINKS, itopk=64),
)


def test_graphs_are_counted_in_what_is_reserved() -> None:
    spec = MemorySpec(name="m", dim=256, capacity=10_000_000, index=IndexKind.FAISS_CAGRA)
    shape = graph_shape(spec)
    assert (shape.num_links, shape.num_met, shape.num_generations, shape.stride) == (64, MOST_MET, 8, 16)
    links = shape.num_generations * shape.span * shape.num_links * 4
    entries = shape.num_generations * shape.num_entries * (spec.dim * 2 + 4)
    assert links + entries < index_bytes(spec, torch.device("cuda", 0)) < 4 * (links + entries)


def test_a_small_graph_is_entered_anywhere() -> None:
    shape = graph_shape(SPEC)
    assert (shape.stride, shape.num_entries, shape.num_met, shape.num_generations) == (1, ROWS, 64, 4)


@pytest.mark.parametrize(("rows", "num_entries"), [(1000, 1000), (2048, 1024), (5000, 1250), (16_384, 1024)])
def test_a_graph_is_entered_at_a_thousand_rows_where_there_are_so_many(rows: int, num_entries: int) -> None:
    """With an eighth of them a walk through four graphs of 2,048 rows around 200 centres missed a sixth of the best."""
    settings = IndexSettings(generation_rows=rows, graph_degree=LINKS, itopk=64)
    assert graph_shape(dataclasses.replace(SPEC, capacity=4 * rows, index_settings=settings)).num_entries == num_entries


def expected_links(nearest: list[list[int]], num_links: int) -> list[list[int]]:
    """What `linked` shall give, slowly. nearest: of each row, the nearest first."""
    forth = []
    for near in nearest:
        detours = [sum(end in nearest[via][:place] for via in near[:place]) for place, end in enumerate(near)]
        forth.append([near[at] for at in sorted(range(len(near)), key=lambda at: (detours[at], at))][:num_links])
    back: list[list[int]] = [[] for _ in nearest]
    for place in range(num_links):
        for node, ends in enumerate(forth):
            back[ends[place]].append(node)
    half, joined = num_links // 2, []
    for ends, sources in zip(forth, back, strict=True):
        ordered = ends[:half] + sources[:half] + ends[half:] + sources[half:num_links]
        joined.append(list(dict.fromkeys(ordered))[:num_links])
    return joined


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("num_links", [4, 7, 8])
def test_rows_have_links_that_no_detour_replaces_both_ways(num_links: int) -> None:
    from memstore.gpu.linking import linked

    near = torch.cdist(rows := torch.randn(100, 8), rows).fill_diagonal_(torch.inf).argsort()[:, : 2 * num_links - 1]
    found = linked(near.int().cuda(), num_links, lambda: None).tolist()
    assert [[end for end in ends if end >= 0] for ends in found] == expected_links(near.tolist(), num_links)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
def test_the_nearest_rows_are_others(metric: Metric) -> None:
    from memstore.gpu.linking import nearest_rows

    spec = MemorySpec(name="m", dim=DIM, capacity=700, metric=metric)
    rows = random_rows(spec, torch.device("cuda"), 700)
    found = nearest_rows(rows.slab, 0, 0, (300, 900), 15, lambda: None).cpu()
    keys = rows.keys.float().cpu()[torch.arange(300, 900) % 700]
    if metric is Metric.COSINE:
        keys = torch.nn.functional.normalize(keys, dim=-1)
    scores = (-torch.cdist(keys, keys).square() if metric is Metric.L2 else keys @ keys.T).fill_diagonal_(-torch.inf)
    best = scores.topk(15)
    torch.testing.assert_close(scores.gather(1, found.long()), best.values, atol=1e-2, rtol=1e-3)
    assert all(len(set(near)) == 15 for near in found.tolist())


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_walks_through_several_generations_find_the_best(metric: Metric, dtype: torch.dtype) -> None:
    from memstore.gpu.graphs import GraphRetriever
    from memstore.gpu.ranges import Ranges
    from memstore.gpu.retriever import GpuRetriever

    gpu = torch.device("cuda")
    spec = dataclasses.replace(SPEC, metric=metric, dtype=dtype)
    slab, end = Slab(spec, gpu), 325
    for first in range(0, end, 25):
        cells = slab.in_all_layers(spec.capacity + (first + torch.arange(25)).to(gpu) % spec.capacity)
        slab.write(slab.stage(torch.randn(2, 25, DIM, device=gpu), {}), cells)
    builder, graphs = GraphBuilder(spec, gpu), GraphRetriever(spec, graph_shape(spec), gpu)
    for first, beyond in ((80, 128), (128, 192), (192, 256), (256, 320)):
        rows = [StoredRows(slab, layer, 1, first, beyond, lambda: None) for layer in (0, 1)]
        graphs.put(1, first // ROWS, [builder.build(each, lambda: None) for each in rows])
    for begin in (75, 100):  # the oldest ones are no longer seen, in the second
        batch = SearchBatch(
            queries=torch.randn(2, 6, DIM, device=gpu).to(dtype),
            layers=(0, 1),
            places=(1,),
            counts=(6,),
            begins=(begin,),
            ends=(end,),
            top_k=10,
        )
        seen = max(begin, 80)
        ranges = Ranges(np.array([[1, 5]]), (np.array([[begin, seen]]), np.array([[320, end]])))
        found, groups = graphs.search(slab, batch, ranges), np.array([[0], [1]])
        assert found is not None
        positions, scores = found
        best, best_scores = GpuRetriever().search(slab, batch)
        torch.testing.assert_close(scores, best_scores, atol=1e-4, rtol=1e-4)
        assert (positions == best).float().mean() > 0.95  # rows of equal scores but for rounding
        options = RetrieveOptions(top_k=10, window_before=1)
        hits = graphs.retrieve(slab, batch, ranges, options, groups)
        want = GpuRetriever().retrieve(slab, batch, options, groups)
        assert hits is not None
        assert hits.scores is not None
        assert want.scores is not None
        torch.testing.assert_close(hits.scores, want.scores, atol=1e-4, rtol=1e-4)
        assert hits.positions[hits.index[..., 1].long()].equal(graphs.search(slab, batch, ranges)[0])
