"""The nearest centres on the host are found piece by piece, and are the same as at once."""

from __future__ import annotations

import numpy as np
import pytest

from memstore.index.host_clustering import SLICE_CENTRES, SLICE_POINTS, Centres, clustered, slices

faiss = pytest.importorskip("faiss")


@pytest.mark.parametrize("metric", ["METRIC_L2", "METRIC_INNER_PRODUCT"])
@pytest.mark.parametrize("num", [1, SLICE_CENTRES, SLICE_CENTRES + 1, 3 * SLICE_CENTRES - 1])
def test_the_nearest_of_many_centres_is_found_in_pieces(metric: str, num: int) -> None:
    random = np.random.default_rng(1)
    points, centres = random.standard_normal((40, 16), np.float32), random.standard_normal((num, 16), np.float32)
    checks: list[int] = []
    found = Centres(faiss, centres, getattr(faiss, metric)).nearest(points, lambda: checks.append(1))
    distances = ((points[:, None] - centres) ** 2).sum(-1) if metric == "METRIC_L2" else -points @ centres.T
    np.testing.assert_array_equal(found, distances.argmin(1))
    assert len(checks) == -(-num // SLICE_CENTRES)


def test_no_slice_has_more_points_than_are_compared_at_a_time() -> None:
    points = np.arange(2 * SLICE_POINTS + 1, dtype=np.float32)[:, None]
    some = list(slices(points))
    assert [len(each) for each in some] == [SLICE_POINTS, SLICE_POINTS, 1]
    np.testing.assert_array_equal(np.concatenate(some), points)


def test_points_far_apart_get_a_centre_each() -> None:
    spots = 100 * np.eye(8, dtype=np.float32)
    points = np.repeat(spots, 100, axis=0) + np.random.default_rng(1).standard_normal((800, 8)).astype(np.float32)
    centres = clustered(faiss, points, 8, faiss.METRIC_L2, lambda: None)
    assert np.abs(centres - spots).max() < 1
