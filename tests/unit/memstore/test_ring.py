"""Rings: positions, slots and the runs between them."""

from __future__ import annotations

import itertools

import pytest
import torch

from memstore import ring


@pytest.mark.parametrize("capacity", [1, 2, 7])
def test_runs_are_the_live_positions_in_order_and_at_most_two(capacity: int) -> None:
    for end in range(3 * capacity + 1):
        for begin in range(max(end - capacity, 0), end + 1):
            runs = ring.runs(begin, end, capacity)
            assert len(runs) <= 2
            positions = [run.position + at for run in runs for at in range(run.length)]
            slots = [run.slot + at for run in runs for at in range(run.length)]
            assert positions == list(range(begin, end))
            assert slots == [position % capacity for position in positions]
            assert all(run.length > 0 for run in runs)


def test_an_empty_or_inverted_range_has_no_runs() -> None:
    assert ring.runs(5, 5, 3) == ring.runs(6, 2, 3) == ()


def test_more_positions_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="4 positions in a ring of 3"):
        ring.runs(0, 4, 3)


def test_slots_of_tensors_are_those_of_numbers() -> None:
    positions = torch.arange(20)
    assert ring.slot_of(positions, 7).tolist() == [ring.slot_of(position, 7) for position in range(20)]


def test_the_newest_position_of_a_slot_was_the_last_written_there() -> None:
    for capacity, end in itertools.product((1, 3, 5), range(12)):
        written = {ring.slot_of(position, capacity): position for position in range(end)}
        newest = ring.newest_positions(torch.arange(capacity), torch.tensor([[end]]), capacity)
        assert newest.shape == (1, capacity)
        for slot, position in enumerate(newest[0].tolist()):
            assert position == written.get(slot, position)
            assert (position < 0) == (slot not in written)
