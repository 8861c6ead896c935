"""Comparing an answer with the oracle's, with an honest tolerance.

A score is a float32 sum of `dim` terms, so it may be off by a few units in the last place of the sum of their sizes.
Two rows whose float64 scores lie closer than that may be given in either order, and either may be the last one given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from memstore.types import Metric

if TYPE_CHECKING:
    from memstore.types import Hits, StepBatch, StepResult
    from tests.reference import ReferenceHit, ReferenceMemory, ReferenceResult, Row

EPSILON = 2.0**-22


def tolerance(metric: Metric, query: torch.Tensor, largest_row: float) -> float:
    """How far a float32 score may be from the float64 one. largest_row: |row| of the longest row that is visible."""
    length = float(query.double().norm())
    if metric is Metric.COSINE:
        return EPSILON * 4
    return EPSILON * 4 * (length + largest_row) ** 2


def assert_same(reference: ReferenceMemory, batch: StepBatch, got: StepResult, want: ReferenceResult) -> None:
    """The answer of a memory to a batch is that of the oracle."""
    assert list(got.sequences) == want.sequences
    assert (got.hits is None) == (want.hits is None)
    if got.hits is None or want.hits is None or batch.retrieve is None:
        return
    _assert_grouped(batch, got.hits)
    assert got.hits.index.shape == (*batch.keys.shape[:2], batch.retrieve.top_k, batch.retrieve.window)
    assert set(got.hits.arrays) == set(batch.retrieve.arrays)
    for layer, layer_hits in enumerate(want.hits):
        for column, hits in enumerate(layer_hits):
            _assert_query(reference, batch, got.hits, layer, column, hits)


def _assert_grouped(batch: StepBatch, hits: Hits) -> None:
    """Rows are those that the index names, each once, by group and then by position."""
    splits = hits.row_splits.tolist()
    assert len(splits) == len(batch.layers) * len(batch.parts) + 1
    assert splits[0] == 0
    assert splits[-1] == len(hits.positions)
    assert splits == sorted(splits)
    assert sorted(set(hits.index.flatten().tolist()) - {-1}) == list(range(len(hits.positions)))
    for group in range(len(splits) - 1):
        positions = hits.positions[splits[group] : splits[group + 1]].tolist()
        assert positions == sorted(set(positions))
    counts = torch.tensor([part.num_rows for part in batch.parts])
    parts = torch.arange(len(batch.parts)).repeat_interleave(counts)
    for layer in range(len(batch.layers)):
        for column, part in enumerate(parts.tolist()):
            group = layer * len(batch.parts) + part
            used = hits.index[layer, column]
            used = used[used >= 0]
            assert bool(((used >= splits[group]) & (used < splits[group + 1])).all())


def _assert_query(
    reference: ReferenceMemory, batch: StepBatch, hits: Hits, layer: int, column: int, want: list[ReferenceHit]
) -> None:
    """One query: the same number of hits, scores that agree place by place, and for each hit its own window."""
    assert batch.retrieve is not None
    centre = batch.retrieve.window_before
    index = hits.index[layer, column].cpu()
    positions = hits.positions.cpu()
    found = [int(positions[row]) for row in index[:, centre].tolist() if row >= 0]
    assert len(found) == len(set(found)) == len(want)
    assert (index[len(want) :] == -1).all()
    if not want:
        return
    by_position = {hit.position: hit for hit in want}
    largest = max(float(row[name].double().norm()) for hit in want for row in hit.rows if row for name in ("key",))
    near = tolerance(reference.spec.metric, batch.keys[layer, column], largest)
    if hits.scores is not None:
        scores = hits.scores[layer, column].cpu()
        assert torch.isneginf(scores[len(want) :]).all()
        assert scores[: len(want)].tolist() == sorted(scores[: len(want)].tolist(), reverse=True)
        for score, hit in zip(scores.tolist(), want, strict=False):
            assert abs(score - hit.score) <= near
    for place, position in enumerate(found):
        expected = want[place]
        if position != expected.position:
            # only rows that score the same may change places, or be the last one
            score = reference.score(batch.keys[layer, column], _row(reference, batch, layer, column, position))
            assert abs(score - expected.score) <= near
            if position not in by_position:
                continue
            expected = by_position[position]
        _assert_window(hits, index[place].tolist(), positions, expected)


def _row(reference: ReferenceMemory, batch: StepBatch, layer: int, column: int, position: int) -> Row | None:
    """The row that a query's hit names, as the oracle knows it."""
    ends = torch.tensor([part.num_rows for part in batch.parts]).cumsum(0)
    part = batch.parts[int(torch.searchsorted(ends, column, right=True))]
    layers = reference.sequences[part.sequence].rows[position]
    return None if layers is None else layers[batch.layers[layer]]


def _assert_window(hits: Hits, index: list[int], positions: torch.Tensor, want: ReferenceHit) -> None:
    assert [int(positions[row]) if row >= 0 else -1 for row in index] == want.window
    for row, entry in zip(index, want.rows, strict=True):
        for name, array in hits.arrays.items() if row >= 0 else ():
            assert entry is not None
            assert torch.equal(array[row].cpu(), entry[name])
