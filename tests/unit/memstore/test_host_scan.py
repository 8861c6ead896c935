"""Parts of compiled search by themselves: how like rows are to a query, tiles of products, and desks that are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memstore.host.compiling import kernel
from memstore.host.likeness import ROWS, nearness, nearness_of_one


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
