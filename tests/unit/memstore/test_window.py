"""Windows and distinct rows against plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch

from memstore.window import distinct_rows, window_offsets


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (0, 3), (1, 1), (64, 64)])
def test_a_window_is_the_neighbours_within_the_range(before: int, after: int, device: torch.device) -> None:
    begin, end = torch.tensor([0, 5, 7]), torch.tensor([9, 12, 8])
    positions = torch.tensor([[[0, 8, -1], [11, 5, 6], [7, -1, -1]], [[4, 3, 2], [5, -1, 11], [-1, -1, -1]]])
    got = window_offsets(positions.to(device), begin.to(device), end.to(device), before, after)
    assert got.shape == (2, 3, 3, before + 1 + after)
    for layer, query, hit in itertools.product(range(2), range(3), range(3)):
        position = int(positions[layer, query, hit])
        low, high = int(begin[query]), int(end[query])
        window = range(position - before, position + after + 1)
        want = [each - low if position >= 0 and low <= each < high else -1 for each in window]
        assert got[layer, query, hit].tolist() == want


def test_distinct_rows_are_grouped_sorted_and_named_by_the_index(device: torch.device) -> None:
    offsets = torch.randint(-1, 6, (3, 7, 4, 2))
    groups = torch.randint(0, 5, (3, 7))
    rows = distinct_rows(offsets.to(device), groups.to(device), 5, 6)
    pairs = {
        (int(groups[layer, query]), offset)
        for layer, query in itertools.product(range(3), range(7))
        for offset in offsets[layer, query].flatten().tolist()
        if offset >= 0
    }
    assert list(zip(rows.groups.tolist(), rows.offsets.tolist(), strict=True)) == sorted(pairs)
    splits = rows.row_splits.tolist()
    assert len(splits) == 6
    for group in range(5):
        assert rows.groups[splits[group] : splits[group + 1]].eq(group).all()
    assert rows.index.dtype == torch.int32
    index = rows.index.cpu().long()
    assert torch.equal(index < 0, offsets < 0)
    named = torch.where(index < 0, -1, rows.offsets.cpu()[index])
    assert torch.equal(named, offsets)
    in_group = rows.groups.cpu()[index] == groups[:, :, None, None]
    assert in_group[index >= 0].all()


@pytest.mark.parametrize("num_queries", [0, 3])
def test_nothing_found_is_no_rows(num_queries: int, device: torch.device) -> None:
    offsets = torch.full((2, num_queries, 4, 2), -1, device=device)
    rows = distinct_rows(offsets, torch.zeros(2, num_queries, dtype=torch.int64, device=device), 3, 10)
    assert rows.row_splits.tolist() == [0, 0, 0, 0]
    assert len(rows.groups) == len(rows.offsets) == 0
    assert rows.index.shape == offsets.shape
    assert rows.index.eq(-1).all()


def test_offsets_beyond_32_bits_keep_their_groups() -> None:
    capacity = 1 << 24
    offsets = torch.tensor([[[[capacity - 1]], [[0]]]])
    rows = distinct_rows(offsets, torch.tensor([[1 << 19, 3]]), 1 << 20, capacity)
    assert rows.groups.tolist() == [3, 1 << 19]
    assert rows.offsets.tolist() == [0, capacity - 1]
    assert rows.index.flatten().tolist() == [1, 0]
