"""Codes: what they keep of a row, and searches whose first pass reads them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numba import njit

from memstore import codes
from memstore.host.best import is_worse, keep_best
from memstore.host.coded import rotate
from memstore.host.dots import CHUNK, Way, make_dot
from memstore.host.retriever import HostRetriever
from memstore.slab import Slab, bytes_needed
from memstore.types import FirstPass, MemorySpec, Metric
from tests.contract.test_index import DTYPES, asked, check, filled

HOST = torch.device("cpu")
CODED = (FirstPass.INT8, FirstPass.INT4, FirstPass.INT2)
DIMS = (1, 2, 3, 31, 64, 100, 257, 384)


@pytest.mark.parametrize("dim", DIMS)
def test_a_rotation_keeps_inner_products_and_is_the_same_compiled(dim: int) -> None:
    rows = torch.randn(5, dim)
    turned = codes.rotated(rows)
    torch.testing.assert_close(turned @ turned.T, rows @ rows.T, rtol=1e-4, atol=1e-4)
    compiled = rows.numpy().copy()
    for row in compiled:
        rotate(row)
    torch.testing.assert_close(torch.from_numpy(compiled), turned, rtol=1e-5, atol=1e-5)


def test_a_rotation_spreads_what_stands_out() -> None:
    row = torch.zeros(1, 256)
    row[0, 17] = 16.0
    assert codes.rotated(row).abs().max() == 1.0


@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
@pytest.mark.parametrize("first_pass", CODED, ids=lambda kind: kind.value)
@pytest.mark.parametrize("dim", DIMS)
def test_terms_make_the_score_of_the_decoded_row(metric: Metric, first_pass: FirstPass, dim: int) -> None:
    slab = filled(
        HOST,
        torch.randn(1, 10, dim),
        metric=metric,
        first_pass=first_pass,
        dim=dim,
        capacity=10,
        max_sequences=1,
        num_layers=1,
    )
    assert slab.codes is not None
    assert slab.terms is not None
    bits, rows = codes.BITS[first_pass], slab.keys[0, 0].float()
    kept = slab.codes[0, 0]
    parts = torch.cat([(kept >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], -1)
    numbers = codes.step(bits) * parts[:, :dim].int() - codes.zero(bits)
    turned = codes.rotated(rows)
    if bits == 2:
        scales = (turned * numbers).sum(-1) / numbers.square().sum(-1)
        assert torch.equal(numbers.sign()[turned != 0], turned.sign()[turned != 0])
    else:
        scales = turned.abs().amax(-1) / codes.limit(bits)
        assert ((numbers * scales[:, None] - turned).abs() <= scales[:, None] * 0.5001).all()
    decoded = numbers * scales[:, None]
    query = codes.rotated(torch.randn(dim))
    terms = slab.terms[0, 0]
    given = terms[:, 0] * (numbers.float() @ query) - terms[:, 1]
    want = decoded @ query
    if metric is Metric.L2:
        want = 2 * want - decoded.square().sum(-1)
    elif metric is Metric.COSINE:
        want = want / rows.norm(dim=-1)
    torch.testing.assert_close(given, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first_pass", CODED, ids=lambda kind: kind.value)
def test_codes_are_reserved_counted_and_copied(first_pass: FirstPass) -> None:
    spec = MemorySpec(name="m", dim=33, capacity=6, max_sequences=2)
    coded = dataclasses.replace(spec, first_pass=first_pass)
    more = {FirstPass.INT8: 33, FirstPass.INT4: 17, FirstPass.INT2: 9}[first_pass] + 8
    assert bytes_needed(coded) - bytes_needed(spec) == 12 * more
    slab = Slab(coded, HOST)
    slab.write(slab.stage(torch.randn(1, 6, 33), {}), torch.arange(6))
    slab.copy_place(0, 1, 2, 3)
    for tensor in (slab.codes, slab.terms):
        assert tensor is not None
        assert torch.equal(tensor[0, 1, 2:5], tensor[0, 0, 2:5])
        assert not tensor[0, 1, :2].any()


@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
@pytest.mark.parametrize("first_pass", CODED, ids=lambda kind: kind.value)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_what_is_among_the_candidates_is_ranked_by_its_row(
    metric: Metric, first_pass: FirstPass, dtype: torch.dtype, dim: int
) -> None:
    slab = filled(
        HOST,
        torch.randn(2, 48, dim),
        metric=metric,
        first_pass=first_pass,
        dtype=dtype,
        dim=dim,
        capacity=16,
        max_sequences=3,
    )  # so few rows that all are candidates
    check(slab, asked(slab, (1, 5, 12), ((20, 36), (0, 16), (3, 14)), dtype=dtype), HostRetriever())


@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
@pytest.mark.parametrize("first_pass", CODED, ids=lambda kind: kind.value)
def test_few_of_the_best_are_missed(metric: Metric, first_pass: FirstPass) -> None:
    rows = torch.randn(1, 40, 1, 64).repeat(1, 1, 100, 1).flatten(1, 2) + torch.randn(1, 4000, 64) * 0.5
    shape = {"dim": 64, "capacity": 4000, "max_sequences": 1, "num_layers": 1, "metric": metric}
    exact, coded = (filled(HOST, rows, first_pass=kind, **shape) for kind in (FirstPass.ROWS, first_pass))
    batch = asked(exact, (8,), ((1000, 5000),), layers=(0,))
    batch.queries[0] = rows[0, ::500] + 0.3 * torch.randn(8, 64)
    want, found = (HostRetriever().search(slab, batch)[0][0] for slab in (exact, coded))
    recall = (want[:, :, None] == found[:, None, :]).any(-1).float().mean()
    assert recall >= 0.97


@pytest.mark.parametrize("has_dot", [True, False])
@pytest.mark.parametrize("has_pairs", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_products_are_the_same_whatever_the_processor_has(bits: int, has_pairs: bool, has_dot: bool) -> None:
    """The largest codes and numbers there are among them: no sum runs over."""
    way = Way(bits, 1)
    if (has_dot and not way.has_dot) or (has_pairs and not way.has_pairs):
        pytest.skip("this processor lacks it")
    dot = make_dot(Way(bits, 1, has_dot, has_pairs))

    def multiplied(codes: object, numbers: object, products: object) -> None:
        dot(codes, 1, numbers, 1, products)

    random = np.random.default_rng(0)
    kept = random.integers(0, 256, (3, 2 * CHUNK), dtype=np.uint8)
    numbers = random.integers(-127, 128, (2, 2 * CHUNK * (8 // bits)), dtype=np.int8)
    kept[1, :CHUNK], numbers[1, ::2] = 255, 127
    products = np.zeros(3, np.int32)
    njit(multiplied)(kept, numbers, products)
    parts = np.concatenate([(kept[1] >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)])
    assert products.tolist() == [0, int(parts.astype(int) @ numbers[1].astype(int)), 0]


@pytest.mark.parametrize("num_kept", [1, 7, 64])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 128])
@pytest.mark.parametrize("num_values", [1, 3, 1000])
def test_the_best_of_a_list_are_kept_in_order_of_position(num_kept: int, count: int, num_values: int) -> None:
    random = np.random.default_rng(count)
    scores = random.integers(-num_values // 2, num_values // 2 + 1, 128).astype(np.float32)
    scores[random.integers(0, 128, 9)] = random.choice([-np.inf, np.inf, 1e-42, -3e38], 9)
    positions = np.sort(random.permutation(1000)[:128])
    best = sorted(zip(-scores[:count], positions[:count], strict=True))[:num_kept]
    kept = keep_best(scores, positions, count, num_kept)
    assert kept == len(best)
    want = sorted((position, -score) for score, position in best)
    assert list(zip(positions[:kept], scores[:kept], strict=True)) == want
    assert not is_worse(1.0, 2, 1.0, 3)
