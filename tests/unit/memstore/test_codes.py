"""Codes: what they keep of a row, and searches whose first pass reads them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from memstore import codes
from memstore.host.coded import rotate
from memstore.host.retriever import HostRetriever
from memstore.slab import Slab, bytes_needed
from memstore.types import FirstPass, MemorySpec, Metric
from tests.contract.test_index import DTYPES, asked, check, filled

HOST = torch.device("cpu")
CODED = (FirstPass.INT8, FirstPass.INT4)
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
    numbers = (kept if bits == 8 else torch.cat((kept & 15, kept >> 4), -1))[:, :dim].int() - codes.zero(bits)
    scales = codes.rotated(rows).abs().amax(-1) / codes.limit(bits)
    decoded = numbers * scales[:, None]
    assert ((decoded - codes.rotated(rows)).abs() <= scales[:, None] * 0.5001).all()
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
    more = {FirstPass.INT8: 33, FirstPass.INT4: 17}[first_pass] + 8
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
        torch.randn(2, 150, dim),
        metric=metric,
        first_pass=first_pass,
        dtype=dtype,
        dim=dim,
        capacity=50,
        max_sequences=3,
    )  # so few rows that all are candidates
    check(slab, asked(slab, (1, 5, 12), ((70, 120), (0, 50), (3, 20)), dtype=dtype), HostRetriever())


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
