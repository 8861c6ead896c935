"""A pass over a text: what each token costs, and the map of what was read."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from integration.demo.reading import BINS, Reading, ReadMap, read
from integration.trace import ReadTrace


def _trace(positions: list[list[int]], mass: list[list[float]]) -> ReadTrace:
    return ReadTrace(counts=(len(positions),), positions=torch.tensor(positions), mass=torch.tensor(mass))


def test_each_token_has_the_position_it_attended_to_most() -> None:
    read_map = ReadMap(1000)
    read_map.add(500, _trace([[3, 7], [8, -1], [-1, -1]], [[0.1, 0.6], [0.3, 0.0], [0.0, 0.0]]))
    assert read_map.source[499:504].tolist() == [-1, 7, 8, -1, -1]
    np.testing.assert_allclose(read_map.share[499:504], [0, 0.6, 0.3, 0, 0], rtol=1e-6)


def test_mass_lies_in_the_stretch_that_read_and_the_stretch_that_was_read() -> None:
    """With as many tokens as stretches a stretch is a token; empty slots count nowhere, repeated ones add up."""
    read_map = ReadMap(BINS)
    read_map.add(90, _trace([[3, 7, 3], [8, -1, -1]], [[0.1, 0.6, 0.2], [0.25, 0.5, 0.5]]))
    wanted = np.zeros((BINS, BINS))
    wanted[90, 3], wanted[90, 7], wanted[91, 8] = 0.3, 0.6, 0.25
    np.testing.assert_allclose(read_map.mass, wanted, rtol=1e-6)
    read_map.add(91, _trace([[8]], [[0.5]]))
    assert read_map.mass[91, 8] == 0.75


def test_the_last_token_lies_in_the_last_stretch() -> None:
    read_map = ReadMap(1001)
    read_map.add(1000, _trace([[999]], [[1.0]]))
    assert read_map.mass[BINS - 1, BINS - 1] == 1.0


def test_perplexity_and_bits_follow_from_the_losses() -> None:
    reading = Reading(losses=np.full(6, math.log(8), dtype=np.float32), seconds=1.0)
    assert reading.perplexity == pytest.approx(8)
    assert reading.bits_per_byte(num_bytes=9) == pytest.approx(6 * 3 / 9)


class Echo(torch.nn.Module):
    """A model whose logits depend on the token alone; it notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(11, 11))
        self.given: list[list[int]] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        self.given.append(input_ids[0].tolist())
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("length", [2, 9, 10, 11, 20])
def test_every_token_but_the_first_is_scored_once_segment_by_segment(length: int) -> None:
    model, tokens, told = Echo(), torch.randint(0, 11, (length,)), list[int]()
    reading = read(model, tokens, 5, told.append)
    assert [token for segment in model.given for token in segment] == tokens[:-1].tolist()
    assert all(len(segment) == 5 for segment in model.given[:-1])
    assert told == [len(segment) for segment in model.given]
    wanted = functional.cross_entropy(model.table[tokens[:-1]], tokens[1:], reduction="none")
    np.testing.assert_allclose(reading.losses, wanted.detach().numpy(), rtol=1e-5)
    assert reading.seconds > 0
    assert reading.retrieval_seconds == 0
