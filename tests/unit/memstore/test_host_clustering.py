"""The nearest centres on the host are found piece by piece, and are the same as at once, whoever finds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from memstore.host.grouping import add_to_nearest
from memstore.index import host_clustering
from memstore.index.host_clustering import (
    NARROW,
    NARROW_POINTS,
    SLICE_CENTRES,
    SLICE_POINTS,
    Centres,
    clustered,
    slices,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

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


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 256), (32, 300)])
def test_narrow_points_are_added_to_the_centre_that_is_nearest(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    points = random.standard_normal((500, shape[0]), np.float32)
    centres = random.standard_normal((shape[1], shape[0]), np.float32)
    nearest = ((points[:, None].astype(np.float64) - centres) ** 2).sum(-1).argmin(1)
    sums, counts = _grouped(points, centres)
    np.testing.assert_array_equal(counts, np.bincount(nearest, minlength=len(centres)))
    expected = np.zeros(centres.shape)
    np.add.at(expected, nearest, points)
    np.testing.assert_allclose(sums, expected, atol=1e-4)


def test_of_equal_centres_the_first_has_the_points() -> None:
    _, counts = _grouped(np.zeros((3, 4), np.float32), np.ones((40, 4), np.float32))
    np.testing.assert_array_equal(counts, [3] + [0] * 39)


@pytest.mark.parametrize(("dim", "num_slices"), [(8, 2), (NARROW + 1, 5)])
def test_compiled_code_gives_the_same_centres(dim: int, num_slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(1).standard_normal((NARROW_POINTS + 100, dim), np.float32)
    checks: list[int] = []
    compiled = clustered(faiss, points, 16, faiss.METRIC_L2, lambda: checks.append(1))
    assert len(checks) == (num_slices + 1) * host_clustering.CLUSTERING_ROUNDS
    monkeypatch.setattr(host_clustering, "_grouping", lambda: None)
    np.testing.assert_allclose(compiled, clustered(faiss, points, 16, faiss.METRIC_L2, lambda: None), atol=1e-3)


def test_the_more_centres_there_are_the_fewer_narrow_points_come_at_a_time() -> None:
    points = np.random.default_rng(1).standard_normal((NARROW_POINTS, 2), np.float32)
    checks: list[int] = []
    clustered(faiss, points, 4 * SLICE_CENTRES, faiss.METRIC_L2, lambda: checks.append(1))
    assert len(checks) == (4 + 1) * host_clustering.CLUSTERING_ROUNDS


def _grouped(points: NDArray[np.float32], centres: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
    sums, counts = np.zeros_like(centres), np.zeros(len(centres), np.float32)
    add_to_nearest(points, np.ascontiguousarray(centres.T), sums, counts)
    return sums, counts
