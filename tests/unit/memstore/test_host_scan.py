"""Parts of compiled search by themselves: how like rows are to a query, tiles of products, and desks that are kept."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from memstore.host import planning
from memstore.host.compiling import kernel
from memstore.host.desk import SHEETS
from memstore.host.helpers import Helpers
from memstore.host.likeness import ROWS, nearness, nearness_of_one
from memstore.host.retriever import HostRetriever
from memstore.host.tiles import PANEL, TILE_ROWS, multiply
from tests.contract.test_index import asked, check, filled

HOST = torch.device("cpu")


@kernel
def near(rows: Any, query: Any, together: Any, alone: Any) -> None:
    """Compares rows both ways."""
    for row in range(0, len(rows), ROWS):
        nearness(rows, row, query, together)
    for row in range(len(rows)):
        nearness_of_one(rows, row, query, alone)


@pytest.mark.parametrize("dim", [1, 7, 8, 31, 64, 100, 256, 257])
def test_a_row_is_as_near_alone_as_among_others(dim: int) -> None:
    random = np.random.default_rng(dim)
    rows, query = random.standard_normal((64, dim), np.float32), random.standard_normal(dim, np.float32)
    together, alone = np.empty(64, np.float32), np.empty(64, np.float32)
    near(rows, query, together, alone)
    assert np.array_equal(together, alone)
    np.testing.assert_allclose(together, -np.square(rows - query).sum(1), rtol=1e-4)


@kernel
def multiplied(rows: Any, weights: Any, panels: Any, bars: Any, tile: Any) -> Any:
    """One tile."""
    return multiply(rows, 0, weights, panels, 0, bars, tile)


@pytest.mark.parametrize("width", [1, PANEL - 1, PANEL])
def test_a_tile_says_which_rows_reach_a_bar(width: int) -> None:
    random = np.random.default_rng(width)
    rows, panels = (
        random.standard_normal((TILE_ROWS, 40), np.float32),
        random.standard_normal((1, 40, PANEL), np.float32),
    )
    weights, tile = random.standard_normal((TILE_ROWS, 2), np.float32), np.empty((TILE_ROWS, PANEL), np.float32)
    want = weights[:, :1] * (rows @ panels[0]) - weights[:, 1:]
    bars = np.full(2 * PANEL, np.inf, np.float32)
    bars[width:] = -np.inf  # of nobody
    assert multiplied(rows, weights, panels, bars[:width], tile) == 0
    np.testing.assert_allclose(tile, want, rtol=1e-4, atol=1e-4)
    bars[width - 1] = np.sort(tile[:, width - 1])[-2]
    reached = sum(1 << row for row in range(TILE_ROWS) if tile[row, width - 1] >= bars[width - 1])
    assert multiplied(rows, weights, panels, bars[:width], tile) == reached
    weights[1, 1] = np.nan
    assert multiplied(rows, weights, panels, bars[:width], tile) & 2


def test_searches_of_one_shape_are_done_on_one_desk() -> None:
    slab, index = filled(HOST), HostRetriever()
    seen = [((1000, 1700), (0, 600)), ((1003, 1703), (1, 602)), ((1010, 1500), (30, 600))]
    desks = []
    for each in seen:
        check(slab, asked(slab, (1, 3), each), index)
        desks.append(index._view(slab).desk(asked(slab, (1, 3), each)))
    assert desks[0] is desks[1]
    assert desks[2] is not desks[0]
    tables = [[*desks[2].tables(asked(slab, (1, 3), seen[2]))] for _ in range(2)]
    assert len(tables[0]) == 1
    assert tables[0][0] is tables[1][0]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_rings_that_grow_and_shrink_are_planned_anew(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "WORTH_A_HELPER", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    slab, index = filled(HOST), HostRetriever()
    for length in (0, 1, 255, 256, 257, 700, 513, 0, 300):
        check(slab, asked(slab, (1, 3), ((1000, 1000 + length), (0, 600))), index)


def test_what_was_found_stays_as_it_is() -> None:
    slab, index = filled(HOST), HostRetriever()
    batches = [asked(slab, (1, 3), ((1000, 1700), (0, 600))) for _ in range(2 * SHEETS + 3)]
    found = [index.search(slab, batch) for batch in batches]
    for batch, (positions, scores) in zip(batches, found, strict=True):
        again = HostRetriever().search(slab, batch)
        assert torch.equal(positions, again[0])
        assert torch.equal(scores, again[1])


def test_a_job_that_a_helper_may_still_look_at_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "WORTH_A_HELPER", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    may_go_on, ask = threading.Event(), Helpers.tell

    def tell(self: Helpers, num: int, function: Any, *job: Any) -> Any:
        def sleep_first(*_: Any) -> None:
            may_go_on.wait()
            function(*job)

        return ask(self, num, sleep_first, *job)

    monkeypatch.setattr(Helpers, "tell", tell)
    slab, index = filled(HOST), HostRetriever()
    batch = asked(slab, (1, 3), ((1000, 1700), (0, 600)))
    check(slab, batch, index)
    desk = index._view(slab).desk(batch)
    tables = [[*desk.tables(batch)] for _ in range(2)]
    assert tables[0][0] is not tables[1][0]
    may_go_on.set()
